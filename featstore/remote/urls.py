"""Parse URLs of remote storage and read its settings from the environment.

Credentials come from the environment alone. A URL that may contain one is refused, and no message
repeats it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from featstore.errors import UserError, one_line

SCHEMES: Final = ("s3", "gs", "az")
FILE_SCHEMES: Final = ("s3", "http", "https")
"""What single files, videos and tars of somebody else, are fetched from."""
PATIENCE_VARIABLE: Final = "MOTE_RETRY_SECONDS"
# Longer than a server takes to restart.
_PATIENCE: Final = 180.0

# One of these variables must say where S3 credentials are. Without any, obstore would wait for a
# network address that only Amazon's machines have.
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
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}(:[0-9]{1,5})?")
# Characters that S3's own guide says to avoid in names, and characters with a meaning in URLs.
_UNSAFE_IN_NAME: Final = frozenset('\\{}^%`[]"<>~#|?*')


def is_url(place: str | Path) -> bool:
    """Return whether `place` is a URL of remote storage; a Path never is."""
    return isinstance(place, str) and "://" in place


def parsed(url: str) -> tuple[str, str, str]:
    """Split a URL into scheme, bucket and prefix; UserError if it is not valid.

    No message repeats what might be a credential.
    """
    scheme, mark, rest = url.partition("://")
    if not mark or scheme not in SCHEMES:
        shown = scheme if mark and re.fullmatch(r"[a-z0-9+.-]{1,20}", scheme) else "no scheme"
        raise UserError(
            f"a URL with {shown} does not name remote storage: use s3://BUCKET/PREFIX (put the "
            "address of a server other than Amazon's into AWS_ENDPOINT_URL)"
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


def parsed_file(url: str) -> tuple[str, str]:
    """Split the URL of one file into that of its folder and its name; UserError if not valid.

    `url` begins with s3, http or https. The name of a file on a web server is decoded
    (`a%20b.tar` is "a b.tar"). No message repeats what might be a credential.
    """
    scheme, mark, rest = url.partition("://")
    if not mark or scheme not in FILE_SCHEMES:
        shown = scheme if mark and re.fullmatch(r"[a-z0-9+.-]{1,20}", scheme) else "no scheme"
        raise UserError(
            f"a URL with {shown} does not name a file: use s3://BUCKET/NAME, https://HOST/NAME or "
            "http://HOST/NAME"
        )
    if scheme == "s3":
        folder, name = url.rstrip("/"), ""
        parsed(folder)
        folder, _, name = folder.rpartition("/")
    else:
        host, _, path = rest.partition("/")
        if "@" in host or "?" in path or "#" in path:
            raise UserError(
                f"the {scheme}:// URL holds a password, '?' or '#': give host and path only, for "
                "what comes after them may be a credential and would be kept in dataset.json"
            )
        if not _HOST.fullmatch(host):
            raise UserError(f"{one_line(repr(host), 80)} is no host: use {scheme}://HOST/PATH")
        above, _, name = unquote(path).rpartition("/")
        folder = f"{scheme}://{host}" + (f"/{above}" if above else "")
        if above:
            check_name(above, "path")
    if not name or folder.endswith(":/"):
        raise UserError(f"the {scheme}:// URL names no file: end it with the file's name")
    check_name(name, "file name")
    return folder, name


def check_name(name: str, kind: str) -> None:
    """Raise UserError unless every part of `name` is plain; `kind` is a word for the message."""
    parts = name.split("/")
    fine = all(part.strip() and part not in (".", "..") for part in parts)
    if not fine or not name.isprintable() or not _UNSAFE_IN_NAME.isdisjoint(name):
        raise UserError(
            f"{one_line(repr(name), 120)} is no {kind}: its parts between '/' must not be empty, "
            f"'.' or '..', nor hold any of {''.join(sorted(_UNSAFE_IN_NAME))}"
        )


def patience_seconds() -> float:
    """Return for how many seconds failing requests are repeated: MOTE_RETRY_SECONDS, or 180.

    UserError if the variable is not a number of seconds from 0 to 86400.
    """
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
    """Raise UserError unless the environment names credentials for S3 servers."""
    if not any(os.environ.get(name) for name in _S3_CREDENTIALS):
        raise UserError(
            "no credentials for s3:// in the environment: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for public data"
        )


def s3_endpoint() -> str:
    """Return the address of the S3 server that the environment names, "" for Amazon's.

    Raises UserError if it is no address or may contain a password.
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
                    "put credentials into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
                )
            return endpoint
    return ""
