"""The metadata of a store: its `zarr.json` files are written once and checked before use.

A store may come from anybody. Therefore the size of each metadata file, the format version and
every array's shape, chunks, type and codecs are compared with the schema before zarr or a codec
sees any of it, and no path in a store may be a symbolic link.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from featstore.commands import remake_command
from featstore.errors import UserError, one_line
from featstore.files.bounded import read_bounded
from featstore.files.documents import parse_json
from featstore.format.array_spec import ArraySpec
from featstore.format.checksums import crc32c
from featstore.format.provenance import Provenance
from featstore.format.schema import (
    CLASS_TEXT_GROUP,
    FORMAT_NAME,
    FORMAT_VERSION,
    MAX_SPLITS,
    StoreSchema,
    array_attributes,
)

# 2,500 tars (Kinetics-700) and their classes take about 0.6 MB; an array's node about 1 KB and
# 700 class names about 20 KB. The limits leave room and stop a file made to exhaust memory.
GROUP_METADATA_LIMIT: Final = 16 * 2**20
ARRAY_METADATA_LIMIT: Final = 2**20

_CHECKED_ATTRIBUTES: Final = (
    *("format", "format_version", "schema", "provenance", "logit_scale"),
    *("tars", "class_names", "raw_class_names", "split_names"),
)

_GUIDING = re.compile("_(spatial|temporal)(-sum)?-[0-9a-f]{16}")
_PROMPT_SET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class DamagedMetadata(UserError):
    """A `zarr.json` of a store cannot be used: it is damaged or was made to do harm."""


@dataclass(frozen=True)
class TarEntry:
    """One packed tar that the store covers: file name, listed samples, size in bytes, sha256."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoreMetadata:
    """Everything the store's group attributes hold."""

    schema: StoreSchema
    provenance: Provenance
    tars: tuple[TarEntry, ...]
    class_names: tuple[str, ...]
    raw_class_names: tuple[str, ...]
    split_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.tars) != self.schema.tars:
            raise ValueError(f"{len(self.tars)} tars listed, the schema has {self.schema.tars}")
        for number, tar in enumerate(self.tars):
            if not 1 <= tar.rows <= self.schema.capacity:
                raise ValueError(
                    f"tar {number} lists {tar.rows} samples, but a partition holds 1 to "
                    f"{self.schema.capacity}"
                )
        if len(self.class_names) != len(self.raw_class_names):
            raise ValueError(
                f"{len(self.class_names)} class names and {len(self.raw_class_names)} raw ones: "
                "there must be equally many of both"
            )
        if len(self.split_names) > MAX_SPLITS or len(set(self.split_names)) < len(self.split_names):
            raise ValueError(f"split names must be distinct and at most {MAX_SPLITS}")
        if self.provenance.dim != self.schema.dim:
            raise ValueError(
                f"the encoder gives {self.provenance.dim} numbers a frame, the schema has "
                f"{self.schema.dim}"
            )
        if self.provenance.tier != self.schema.tier:
            raise ValueError(
                f"the provenance has tier {self.provenance.tier}, the schema {self.schema.tier}"
            )

    def group_node(self) -> dict[str, Any]:
        """The store's own `zarr.json` as a JSON-ready dict."""
        attributes = {
            "format": FORMAT_NAME,
            "format_version": self.schema.version,
            "schema": self.schema.to_json(),
            "provenance": self.provenance.to_json(),
            "logit_scale": self.provenance.logit_scale,
            "tars": [asdict(tar) for tar in self.tars],
            "class_names": list(self.class_names),
            "raw_class_names": list(self.raw_class_names),
            "split_names": list(self.split_names),
        }
        attributes["checksum"] = attributes_checksum(attributes)
        return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def attributes_checksum(attributes: Mapping[str, Any]) -> int:
    """Return the crc32c of the format's group attributes as JSON: keys sorted, ASCII, no spaces.

    Chunks have checksums of their own; without this one, names and provenance would have none.
    """
    return json_checksum({name: attributes.get(name) for name in _CHECKED_ATTRIBUTES})


def json_checksum(value: Any) -> int:
    """Return the crc32c of `value` as JSON: keys sorted, ASCII, no spaces."""
    return crc32c(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def tar_entry(value: Mapping[str, Any]) -> TarEntry:
    """Make a TarEntry from {"file", "rows", "bytes", "sha256"}; ValueError if a type is wrong."""
    entry = TarEntry(value["file"], value["rows"], value["bytes"], value["sha256"])
    numbers, texts = (entry.rows, entry.bytes), (entry.file, entry.sha256)
    if not all(type(n) is int for n in numbers) or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"not a tar entry: {value!r}")
    return entry


def check_prompt_set(name: str) -> str:
    """Return `name` if it can be the name of a prompt set; UserError otherwise."""
    if not _PROMPT_SET.fullmatch(name):
        raise UserError(
            f"{name!r} is no name for a prompt set: use letters, digits, '.', '_' and '-'"
        )
    return name


def check_text_name(name: str) -> str:
    """Return `name` if class texts can be kept under it; UserError otherwise.

    Besides names of prompt sets, those are taken that `class_texts.guiding_name` gives.
    """
    return name if _GUIDING.fullmatch(name) else check_prompt_set(name)


def read_metadata(store: Path) -> StoreMetadata:
    """Read and check all metadata of the store at `store` without reading a chunk.

    Raises UserError if it is not a store of this format and version, or not safe to open.
    """
    try:
        there, is_group = store.is_dir(), (store / "zarr.json").is_file()
    except OSError as error:  # this user may not read the folder, or its name is too long
        raise UserError(
            f"{store} cannot be read ({error.strerror}): name a folder that you may read"
        ) from error
    if not there:
        previous = store.with_name(f"{store.name}.previous")
        if previous.is_dir():
            raise UserError(
                f"{store} was being replaced when its process was killed, and {previous} is the "
                "store before that: rename it back, or run the same `mote-cli store` command again"
            )
        found = "it is a file" if store.exists() else "no such folder"
        raise UserError(
            f"{store} is not a feature store: {found}; give the folder of a store, or make one "
            f"with `{remake_command(store)}`"
        )
    if not is_group:
        if (store / ".zgroup").exists() or (store / ".zarray").exists():
            raise UserError(
                f"{store} is a Zarr v2 store: only v3 is read, because a v2 store can carry code; "
                f"move it away and run `{remake_command(store)}`"
            )
        raise UserError(
            f"{store} is not a feature store: it has no zarr.json; name a store, or make one "
            f"with `{remake_command(store)}`"
        )
    node = read_node(store, "zarr.json", GROUP_METADATA_LIMIT)
    metadata = _parse_group(store, node)
    for name, spec in metadata.schema.arrays().items():
        check_array(store, name, spec)
    return metadata


def read_node(store: Path, key: str, limit: int) -> dict[str, Any]:
    """Parse the metadata file `key`; UserError if it is not valid or longer than `limit` bytes."""
    path = inside(store, key)
    try:
        raw = read_bounded(path, limit)
    except OSError as error:
        raise DamagedMetadata(
            f"{path} cannot be read ({error.strerror}): {store} is not a complete feature store; "
            f"remove it and run `{remake_command(store)}`"
        ) from error
    except ValueError as error:
        raise DamagedMetadata(
            f"{path} {error}: no store of this format needs that; "
            "do not open a store from a source you do not trust"
        ) from error
    try:
        node = parse_json(raw)
    except ValueError as error:
        raise DamagedMetadata(
            f"{path} is not valid JSON ({one_line(error, 120)}): the store is damaged, make it "
            "again; do not open a store from a source you do not trust"
        ) from error
    if not isinstance(node, dict) or node.get("zarr_format") != 3:
        raise DamagedMetadata(f"{path} is not Zarr v3 metadata: only Zarr v3 stores are read")
    return node


def inside(store: Path, key: str) -> Path:
    """Return the path of `key` in the store; UserError if a symbolic link is on the way in it.

    The path of the store's folder itself may contain links. Keys are built from numbers and
    checked names, never from data.
    """
    return without_links(os.path.realpath(store), key)


def without_links(root: str, key: str) -> Path:
    """Do the same as `inside` when the real path of the store's folder is known: `root`."""
    path = root
    for part in key.split("/"):
        path = f"{path}/{part}"
        if os.path.islink(path):
            raise UserError(
                f"{path} is a symbolic link: a store must hold its own files; replace the link by "
                "the file or do not open this store"
            )
    return Path(path)


def check_array(store: Path, name: str, spec: ArraySpec) -> None:
    """Raise UserError, which names the first difference, unless a `zarr.json` is as specified."""
    node = read_node(store, f"{name}/zarr.json", ARRAY_METADATA_LIMIT)
    expected = _comparable(spec.metadata())
    found = _comparable(node)
    for field in sorted(expected.keys() | found.keys()):
        if _exact(expected.get(field)) != _exact(found.get(field)):
            raise DamagedMetadata(
                f"array {name} of {store}: {field} is {_brief(found.get(field))}, but the format "
                f"has {_brief(expected.get(field))}; remove the store and run "
                f"`{remake_command(store)}`"
            )


def wrong_attributes(store: Path, metadata: StoreMetadata) -> list[tuple[str, str]]:
    """Return (array or group, what is wrong) for all changed attributes that other readers use.

    featstore does not read these attributes: units, names of entries, the meaning of numbers. An
    attribute that somebody added is no error. UserError as `read_node`.
    """
    wrong = []
    for name, node in array_nodes(metadata).items():
        attributes = read_node(store, f"{name}/zarr.json", ARRAY_METADATA_LIMIT).get("attributes")
        found = attributes if isinstance(attributes, dict) else {}
        expected = node["attributes"]
        lost = [key for key in expected if _exact(found.get(key)) != _exact(expected[key])]
        if lost:
            wrong.append((name, f"its attribute {lost[0]!r} was changed: put a copy of it back"))
    try:
        node = read_node(store, f"{CLASS_TEXT_GROUP}/zarr.json", ARRAY_METADATA_LIMIT)
        if node.get("node_type") != "group":
            wrong.append((CLASS_TEXT_GROUP, "it is not a group's zarr.json: put a copy of it back"))
    except UserError as error:
        wrong.append((CLASS_TEXT_GROUP, str(error)))
    return wrong


def prompt_set_names(store: Path) -> list[str]:
    """Return the names of the prompt sets whose class texts the store holds, sorted."""
    folder = inside(store, CLASS_TEXT_GROUP)
    try:
        # A folder without its zarr.json is listed too, so that reading it raises an error and the
        # prompt set does not just disappear.
        names = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    except OSError as error:
        raise UserError(
            f"{folder} cannot be read ({error.strerror}): make it readable for your user"
        ) from error
    return [name for name in names if _PROMPT_SET.fullmatch(name)]


def array_nodes(metadata: StoreMetadata) -> dict[str, dict[str, Any]]:
    """Return the `zarr.json` of every array by its name, without class texts."""
    attributes = array_attributes(metadata.schema)
    arrays = metadata.schema.arrays()
    return {name: spec.metadata(attributes.get(name)) for name, spec in arrays.items()}


def _parse_group(store: Path, node: dict[str, Any]) -> StoreMetadata:
    attributes = node.get("attributes")
    if node.get("node_type") != "group" or not isinstance(attributes, dict):
        raise UserError(
            f"{store} is a Zarr array, not a feature store: give the folder of the whole store, "
            "which holds `features` and `commit`"
        )
    if attributes.get("format") != FORMAT_NAME:
        raise UserError(
            f"{store} is a Zarr group but not a feature store: its attribute format is "
            f"{_brief(attributes.get('format'))}, not {FORMAT_NAME!r}; open it with zarr, or name "
            "a feature store"
        )
    version = attributes.get("format_version")
    if type(version) is not int or version < 1:
        raise UserError(f"{store} has format version {_brief(version)}: it must be a whole number")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{store} has format version {version}, this mote reads up to {FORMAT_VERSION}: "
            "install a newer mote-video"
        )
    texts = [attributes.get(n) for n in ("class_names", "raw_class_names", "split_names")]
    tars = attributes.get("tars")
    sizes = attributes.get("schema")
    if not all(map(is_texts, texts)) or not isinstance(tars, list) or not isinstance(sizes, dict):
        raise DamagedMetadata(f"{store} lacks attributes of the format: make it again")
    provenance = Provenance.from_json(attributes.get("provenance"))
    if attributes.get("checksum") != attributes_checksum(attributes):
        raise DamagedMetadata(
            f"the attributes of {store} fail their checksum: zarr.json is damaged or was edited by "
            "hand; put a copy of the file back, or remove the store and run "
            f"`{remake_command(store)}`"
        )
    try:
        schema = StoreSchema(**sizes)
        if schema.version > version:
            raise ValueError(f"format version {version} has no sequences")
        return StoreMetadata(
            schema,
            provenance,
            tuple(tar_entry(tar) for tar in tars),
            *(tuple(names or ()) for names in texts),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedMetadata(f"the attributes of {store} do not fit together: {error}") from error


def _exact(value: Any) -> str:
    """Return `value` as text, because 1, 1.0 and true are equal in Python but not elsewhere."""
    return json.dumps(value, sort_keys=True)


def _comparable(node: dict[str, Any]) -> dict[str, Any]:
    """Return a node without attributes, with one spelling for fields that mean the same."""
    node = {key: value for key, value in node.items() if key != "attributes"}
    if not node.get("storage_transformers"):
        node.pop("storage_transformers", None)
    node["codecs"] = _plain_codecs(node.get("codecs"))
    return node


def _plain_codecs(value: Any) -> Any:
    """Return codec lists without empty configurations, which some writers leave out."""
    if isinstance(value, list):
        return [_plain_codecs(item) for item in value]
    if isinstance(value, dict):
        plain = {key: _plain_codecs(item) for key, item in value.items()}
        return {k: v for k, v in plain.items() if not (k == "configuration" and v == {})}
    return value


def is_texts(value: Any) -> bool:
    """Return whether `value` is a list of strings."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(item, str) for item in value)
    )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:119] + "…"
