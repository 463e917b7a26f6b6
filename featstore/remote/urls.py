"""URLs of remote storage and what the environment says about it, without any of it in messages.

Credentials come from the environment alone; what might be one in a URL is refused, not repeated.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from featstore.errors import UserError, one_line

SCHEMES: Final = ("s3", "gs", "az")
PATIENCE_VARIABLE: Final = "MOTE_RETRY_SECONDS"
# Longer than a server takes to restart.
_PATIENCE: Final = 180.0

# One of these says where S3 credentials are; without any, obstore would ask the network address
# that only Amazon's machines have, and wait.
_S3_CREDENTIALS: Final = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_METADATA_ENDPOINT",
    "AWS_SKIP_SIGNATURE",
)
_ENDPOINTS: Final = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
# Characters that S3's own guide says to avoid in names, and those a URL gives a meaning.
_UNSAFE_IN_NAME: Final = frozenset('\\{}^%`[]"<>~#|?*')


def is_url(place: str | Path) -> bool:
    """Whether `place` names remote storage rather than a path; a Path never does."""
    return isinstance(place, str) and "://" in place


def parsed(url: str) -> tuple[str, str, str]:
    """Scheme, bucket and prefix of a URL; no message repeats what might be a credential."""
    scheme, mark, rest = url.partition("://")
    if not mark or scheme not in SCHEMES:
        shown = scheme if mark and re.fullmatch(r"[a-z0-9+.-]{1,20}", scheme) else "no scheme"
        raise UserError(
            f"a URL with {shown} is not one of remote storage: use s3://BUCKET/PREFIX (the address "
            "of a server other than Amazon's goes into AWS_ENDPOINT_URL)"
        )
    bucket, _, prefix = rest.partition("/")
    if "@" in rest or ":" in bucket:
        raise UserError(
            f"the {scheme}:// URL holds credentials or a port: credentials are taken from the "
            "environment only (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), a server's address from "
            "AWS_ENDPOINT_URL"
        )
    if "?" in rest or "#" in rest:
        raise UserError(
            f"the {scheme}:// URL holds '?' or '#': give bucket and prefix only, without a query"
        )
    if not _BUCKET.fullmatch(bucket):
        raise UserError(f"{bucket!r} is no name for a bucket: use {scheme}://BUCKET/PREFIX")
    prefix = prefix.rstrip("/")
    if prefix:
        check_name(prefix, "prefix")
    return scheme, bucket, prefix


def check_name(name: str, kind: str) -> None:
    """UserError unless every part of `name` is a plain one; `kind` is what it names."""
    parts = name.split("/")
    fine = all(part.strip() and part not in (".", "..") for part in parts)
    if not fine or not name.isprintable() or not _UNSAFE_IN_NAME.isdisjoint(name):
        raise UserError(
            f"{one_line(repr(name), 120)} is no {kind}: its parts between '/' must not be empty, "
            f"'.' or '..', nor hold any of {''.join(sorted(_UNSAFE_IN_NAME))}"
        )


def patience_seconds() -> float:
    """How long failing requests are repeated: MOTE_RETRY_SECONDS, or 180."""
    text = os.environ.get(PATIENCE_VARIABLE)
    if text is None:
        return _PATIENCE
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 86400:
        raise UserError(f"{PATIENCE_VARIABLE} is {text!r}: it must be seconds from 0 to 86400")
    return seconds


def require_credentials() -> None:
    """UserError unless the environment says with which credentials to talk to an S3 server."""
    if not any(os.environ.get(name) for name in _S3_CREDENTIALS):
        raise UserError(
            "no credentials for s3:// in the environment: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for public data"
        )


def s3_endpoint() -> str:
    """Address of the S3 server that the environment names, "" for Amazon's.

    UserError when it is none, or holds a password.
    """
    for name in _ENDPOINTS:
        if endpoint := os.environ.get(name):
            try:
                parts = urlsplit(endpoint)
                usable = parts.scheme in ("http", "https") and "@" not in parts.netloc
            except ValueError:
                usable = False
            if not usable:
                raise UserError(
                    f"{name} must be http://HOST:PORT or https://HOST:PORT, without credentials: "
                    "these go into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                )
            return endpoint
    return ""
