"""The arrays of a feature store, described as data: names, shapes, types, chunks, codecs, units.

Dimension letters: N rows = tars x capacity, V views, F frames, D dim of the embedding. Where
docstrings say [V, F, D] for features, a store of another tier has [V, F, *item]
(`featstore.format.tiers`).

Row `tar * capacity + position` belongs to sample `position` of tar `tar`. Each tar has exactly one
chunk (shard) file of every array, so that partitions never share a file. The metadata files are
written from these specifications, and every store is checked against them before a chunk is read.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from featstore.errors import UserError
from featstore.format.tiers import EMBEDDINGS, Tier

FORMAT_NAME: Final = "mote-features"
FORMAT_VERSION: Final = 1

STATUS_EMPTY: Final = 0
STATUS_OK: Final = 1
STATUS_FAILED: Final = 2

# zarr-python costs about 0.15 ms per inner chunk whatever its size, and one inner chunk is the
# least that a remote reader fetches: 1 to 2 MB serves both (measured on 32 x 512 float16 rows).
TARGET_CHUNK_BYTES: Final = 1_500_000

# `splits` is a 32-bit mask: bit i says that the row belongs to split i.
MAX_SPLITS: Final = 32

# How the inner chunks of the features may be compressed. Shards without compression are dense
# arrays that can be mapped. Of Blosc's filters, bitshuffle saves most on float16 features (they
# take 86 % of their size with zstd, 88 % with lz4).
CODECS: Final = ("none", "zstd", "lz4")
_BLOSC_LEVEL: Final = {"zstd": 1, "lz4": 5}
# The type of one stored number of the features: float16, int8 with a scale per dimension, or uint8
# for pixels.
FEATURE_TYPES: Final = ("float16", "int8", "uint8")
# This number stands for NaN, which int8 lacks; the quantised numbers are -127..127.
INT8_MISSING: Final = -128
# Blosc adds a header of 16 bytes to a chunk it cannot compress.
BLOSC_HEADER_BYTES: Final = 16

CRC_BYTES: Final = 4
# The offset and the length of an inner chunk that a shard does not hold (Zarr v3 sharding).
ABSENT: Final = 2**64 - 1

# These limits are far beyond any data set and still need little memory: a reader keeps 13 bytes per
# inner chunk, and one decoded chunk. Blosc cannot make larger chunks either.
MAX_CHUNKS: Final = 2**24
MAX_CHUNK_BYTES: Final = 2**31 - 1
FEATURE_SCALE: Final = "feature_scale"
CLASS_TEXT_GROUP: Final = "class_text"

COMMIT_ENTRIES: Final = ("rows", "checksum_crc32c", "features_bytes", "unix_time")

SPANS: Final = "spans"
"""The one array of a partition that only some stores have: those of several classes a video."""

_ROW: Final = ("row",)
_FRAME: Final = ("row", "view", "frame")
# The arrays with one small chunk per tar, in the order in which they are written. For each: data
# type, fill value, dimensions, units.
_CHUNK_PER_TAR: Final[dict[str, tuple[str, int | str, tuple[str, ...], str]]] = {
    "key": ("string", "", _ROW, ""),
    "reason": ("string", "", _ROW, ""),
    "label": ("int32", -1, _ROW, ""),
    SPANS: ("string", "", _ROW, ""),
    "num_frames": ("int32", 0, _ROW, "frames"),
    "fps": ("float32", "NaN", _ROW, "frames per second"),
    "status": ("uint8", STATUS_EMPTY, _ROW, ""),
    "splits": ("uint32", 0, _ROW, ""),
    "container_frames": ("int32", 0, _ROW, "frames"),
    "damaged_packets": ("int32", 0, _ROW, "packets"),
    "frame_index": ("int32", -1, _FRAME, "frames"),
    "pts": ("float64", "NaN", _FRAME, "seconds"),
    "checksum": ("uint32", 0, _ROW, ""),
    "chunk_checksum": ("uint32", 0, ("tar", "small_array"), ""),
    "commit": ("uint64", 0, ("tar", "entry"), ""),
}
# The arrays with one file per partition that every store has.
PARTITION_ARRAYS: Final = (*(name for name in _CHUNK_PER_TAR if name != SPANS), "features")

_BYTES: Final[dict[str, Any]] = {"name": "bytes", "configuration": {"endian": "little"}}
_SINGLE_BYTES: Final[dict[str, Any]] = {"name": "bytes"}
_CRC: Final[dict[str, Any]] = {"name": "crc32c"}
_VLEN: Final[dict[str, Any]] = {"name": "vlen-utf8", "configuration": {}}
_ZSTD: Final[dict[str, Any]] = {"name": "zstd", "configuration": {"level": 3, "checksum": False}}
# The codecs of small arrays by data type; all other types use the codecs of multi-byte numbers.
_CODECS: Final = {"string": (_VLEN, _ZSTD, _CRC), "uint8": (_SINGLE_BYTES, _CRC)}


@dataclass(frozen=True)
class ArraySpec:
    """One array of the store, with everything that its `zarr.json` needs.

    `chunks` is the shape that one file holds. If `shards` is given, a file holds that shape instead
    and `chunks` is the shape of an inner chunk. `dtype` is the Zarr v3 data type name. `fill` is
    the fill value in JSON, so NaN is the string "NaN".
    """

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None
    fill: int | str
    codecs: tuple[dict[str, Any], ...]
    dimension_names: tuple[str, ...]
    units: str

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The little-endian numpy type of a numeric array; ValueError for strings."""
        if self.dtype == "string":
            raise ValueError("a string array has no fixed-width numpy type")
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def file_bytes(self) -> int:
        """The size of a chunk file of a numeric array that is neither sharded nor compressed."""
        return math.prod(self.chunks) * self.numpy_dtype.itemsize + CRC_BYTES

    @property
    def missing(self) -> float | str:
        """The value of rows that were not written: the fill value as a number or a text."""
        return float("nan") if self.fill == "NaN" else self.fill

    def metadata(self, attributes: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return the array's `zarr.json` (Zarr v3 core specification) as a JSON-ready dict."""
        codecs: list[dict[str, Any]] = [dict(codec) for codec in self.codecs]
        if self.shards is not None:
            codecs = [
                {
                    "name": "sharding_indexed",
                    "configuration": {
                        "chunk_shape": list(self.chunks),
                        "codecs": codecs,
                        "index_codecs": [_BYTES, _CRC],
                        "index_location": "end",
                    },
                }
            ]
        units = {"units": self.units} if self.units else {}
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": list(self.shards or self.chunks)},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": self.fill,
            "codecs": codecs,
            "attributes": units | (attributes or {}),
            "dimension_names": list(self.dimension_names),
            "storage_transformers": [],
        }

    def chunk_key(self, tar: int) -> str:
        """Return the key, relative to the array, of the one file that belongs to `tar`."""
        return "/".join(["c", str(tar), *["0"] * (len(self.shape) - 1)])


@dataclass(frozen=True)
class StoreSchema:
    """The sizes that determine every array of a store.

    There are `tars` partitions of `capacity` rows. Each row of features is [views, frames, *item].
    An inner chunk of the features has `chunk_rows` rows, a divisor of `capacity`. `dim` is the
    width of the class texts. `codec` compresses the features, and `feature_type` is the type they
    are stored as; int8 is read as float16. `tier` says what an item is (`featstore.format.tiers`):
    by default an embedding [dim], for which `item` may be left out. With `multi_label` a video may
    show several classes, which the array `spans` holds. Raises ValueError if a size is
    not positive, `chunk_rows` is no divisor, codec, type or tier is unknown, or they do not fit.
    """

    tars: int
    capacity: int
    views: int
    frames: int
    dim: int
    chunk_rows: int
    codec: str = "none"
    feature_type: str = "float16"
    tier: str = EMBEDDINGS
    item: tuple[int, ...] = ()
    multi_label: bool = False

    def __post_init__(self) -> None:
        # JSON gives a list. An embedding is as wide as the class texts.
        object.__setattr__(self, "item", tuple(self.item) or (self.dim,))
        if self.codec not in CODECS or self.feature_type not in FEATURE_TYPES:
            raise ValueError(
                f"features of type {self.feature_type!r} with codec {self.codec!r}: this version "
                f"knows {', '.join(FEATURE_TYPES)} and {', '.join(CODECS)}"
            )
        try:
            tier = Tier.parse(self.tier)
        except (UserError, AttributeError) as error:
            raise ValueError(f"tier {self.tier!r} is not one this version knows") from error
        for name in (field.name for field in fields(self) if field.default is MISSING):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}: it must be a positive whole number")
        if self.capacity % self.chunk_rows:
            raise ValueError(
                f"chunk_rows {self.chunk_rows} does not divide the capacity {self.capacity}"
            )
        tier.check_item(self.item)
        if tier.pooled and self.item != (self.dim,):
            raise ValueError(f"embeddings are {list(self.item)}, class texts {self.dim} wide")
        chunks = self.tars * self.chunks_per_shard
        if chunks > MAX_CHUNKS or max(self.chunk_bytes, self.row_bytes) > MAX_CHUNK_BYTES:
            raise ValueError(
                f"{chunks} inner chunks of {self.chunk_bytes} bytes: at most {MAX_CHUNKS} of "
                f"{MAX_CHUNK_BYTES} bytes are read; do not open a store from a source you do not "
                "trust"
            )
        if self.feature_type not in tier.feature_types:
            raise ValueError(f"{tier.text} are not stored as {self.feature_type}")

    @classmethod
    def create(
        cls,
        tars: int,
        capacity: int,
        views: int,
        frames: int,
        dim: int,
        *,
        tier: str = EMBEDDINGS,
        item: tuple[int, ...] = (),
        multi_label: bool = False,
    ) -> StoreSchema:
        """Make a schema whose inner chunks are as large as possible, up to about 1.5 MB."""
        kind = Tier.parse(tier).feature_types[0]
        row_bytes = views * frames * math.prod(item or (dim,)) * np.dtype(kind).itemsize
        wanted = max(1, min(capacity, TARGET_CHUNK_BYTES // max(1, row_bytes)))
        chunk_rows = next((n for n in range(wanted, 0, -1) if capacity % n == 0), 1)
        return cls(
            *(tars, capacity, views, frames, dim, chunk_rows),
            feature_type=kind,
            tier=tier,
            item=item,
            multi_label=multi_label,
        )

    def to_json(self) -> dict[str, int | str | list[int]]:
        """Return the sizes by name, as the store's attribute `schema` holds them.

        What comes after `chunk_rows` is left out if it has its usual value.
        """
        held = [field for field in fields(self) if getattr(self, field.name) != field.default]
        value = {field.name: getattr(self, field.name) for field in held} | {"item": [*self.item]}
        if self.pooled:
            del value["item"]
        return value

    @property
    def per_tar_arrays(self) -> tuple[str, ...]:
        """The arrays with one small chunk per tar, but for `commit`, in the order of writing."""
        without = {"commit"} if self.multi_label else {"commit", SPANS}
        return tuple(name for name in _CHUNK_PER_TAR if name not in without)

    @property
    def small_arrays(self) -> tuple[str, ...]:
        """The arrays whose checksums `chunk_checksum` holds."""
        return self.per_tar_arrays[:-1]

    @property
    def partition_arrays(self) -> tuple[str, ...]:
        """All arrays with one file per partition, in the order in which they are written.

        The commit entry comes last, because it marks the partition as done.
        """
        return (*self.per_tar_arrays, "features", "commit")

    @property
    def rows(self) -> int:
        """N, the number of rows of every array, filled or not."""
        return self.tars * self.capacity

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape (views, frames, *item) of one row of features."""
        return self.views, self.frames, *self.item

    @property
    def row_bytes(self) -> int:
        """The size in bytes of one row of features in memory."""
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type that reading features gives: float16, or uint8 for frames."""
        return np.dtype(np.float16 if self.quantised else self.feature_type)

    @property
    def missing(self) -> float:
        """The value of all features of a failed row: NaN, or 0 if the type has no NaN."""
        return float("nan") if self.dtype.kind == "f" else 0.0

    @property
    def pooled(self) -> bool:
        """Whether the features are embeddings, which heads are trained on."""
        return self.tier == EMBEDDINGS

    @property
    def quantised(self) -> bool:
        """Whether the features are stored as int8 with a scale per dimension."""
        return self.feature_type == "int8"

    @property
    def mappable(self) -> bool:
        """Whether a shard is a dense array that can be mapped into memory without decoding."""
        return self.codec == "none" and not self.quantised

    @property
    def storage(self) -> str:
        """How the features are stored, in words: "float16", "int8 per dimension, zstd"."""
        kind = "int8 per dimension" if self.quantised else self.feature_type
        return kind if self.codec == "none" else f"{kind}, {self.codec}"

    @property
    def chunk_bytes(self) -> int:
        """The size in bytes of one inner chunk of the features as stored, before compression."""
        width = np.dtype(self.feature_type).itemsize
        return self.chunk_rows * math.prod(self.row_shape) * width

    @property
    def chunks_per_shard(self) -> int:
        """The number of inner chunks in one shard of the features."""
        return self.capacity // self.chunk_rows

    @property
    def index_bytes(self) -> int:
        """The size of a shard's index: offset and length (u8) per inner chunk, then its crc32c."""
        return 16 * self.chunks_per_shard + CRC_BYTES

    def shard_bytes(self, rows: int) -> int:
        """Return the size in bytes of the features file of a partition that lists `rows` samples.

        Inner chunks that hold no listed row are absent from the shard. With a codec, the result is
        the largest size that the file can have.
        """
        chunks = -(-rows // self.chunk_rows)
        header = 0 if self.codec == "none" else BLOSC_HEADER_BYTES
        return chunks * (self.chunk_bytes + header + CRC_BYTES) + self.index_bytes

    def shard_can_have(self, size: int, rows: int) -> bool:
        """Return whether the features file of `rows` samples can have this size in bytes."""
        most = self.shard_bytes(rows)
        return size == most if self.codec == "none" else self.index_bytes < size <= most

    def arrays(self) -> dict[str, ArraySpec]:
        """Return every array of the store except the class texts (see `class_text_spec`)."""
        arrays = {
            "features": ArraySpec(
                shape=(self.rows, *self.row_shape),
                dtype=self.feature_type,
                chunks=(self.chunk_rows, *self.row_shape),
                shards=(self.capacity, *self.row_shape),
                fill={"int8": INT8_MISSING, "uint8": 0}.get(self.feature_type, "NaN"),
                codecs=self._feature_codecs(),
                dimension_names=(*_FRAME, *Tier.parse(self.tier).dimension_names),
                units="",
            )
        }
        # For each dimension: the size of the array and the size of a chunk.
        sizes = {
            "row": (self.rows, self.capacity),
            "tar": (self.tars, 1),
            "view": (self.views, self.views),
            "frame": (self.frames, self.frames),
            "small_array": (len(self.small_arrays), len(self.small_arrays)),
            "entry": (len(COMMIT_ENTRIES), len(COMMIT_ENTRIES)),
        }
        for array in (*self.per_tar_arrays, "commit"):
            dtype, fill, names, units = _CHUNK_PER_TAR[array]
            shape, chunks = zip(*(sizes[name] for name in names), strict=True)
            codecs = _CODECS.get(dtype, (_BYTES, _CRC))
            arrays[array] = ArraySpec(shape, dtype, chunks, None, fill, codecs, names, units)
        if self.quantised:
            scale = (self.dim,)
            arrays[FEATURE_SCALE] = ArraySpec(
                scale, "float32", scale, None, "NaN", (_BYTES, _CRC), ("dim",), ""
            )
        return arrays

    def _feature_codecs(self) -> tuple[dict[str, Any], ...]:
        width = np.dtype(self.feature_type).itemsize
        plain = _SINGLE_BYTES if width == 1 else _BYTES
        if self.codec == "none":
            return plain, _CRC
        blosc = {
            "name": "blosc",
            "configuration": {
                "typesize": width,
                "cname": self.codec,
                "clevel": _BLOSC_LEVEL[self.codec],
                "shuffle": "bitshuffle",
                "blocksize": 0,
            },
        }
        return plain, blosc, _CRC


def class_text_spec(classes: int, dim: int) -> ArraySpec:
    """Describe `class_text/<prompt set>`: float32 [classes, dim], rows of length 1, one chunk."""
    shape = (classes, dim)
    return ArraySpec(shape, "float32", shape, None, "NaN", (_BYTES, _CRC), ("class", "dim"), "")


# These attributes tell readers that do not know this package what the numbers of some arrays mean.
_ATTRIBUTES: Final[dict[str, dict[str, Any]]] = {
    FEATURE_SCALE: {"meaning": "features x scale, in float16; -128 stands for NaN"},
    "commit": {"entries": list(COMMIT_ENTRIES)},
    "checksum": {"algorithm": "crc32c of the row's features"},
    "status": {"meaning": {"empty": STATUS_EMPTY, "ok": STATUS_OK, "failed": STATUS_FAILED}},
    "splits": {"meaning": "bit i is set when the row belongs to split_names[i]"},
    SPANS: {"meaning": "JSON of [label] or [label, start, end], the times in seconds"},
}


def array_attributes(schema: StoreSchema) -> dict[str, dict[str, Any]]:
    """Return the attributes of the arrays of a store by array; most arrays have none."""
    sums = {"arrays": list(schema.small_arrays), "algorithm": "crc32c of the chunk file"}
    return {**_ATTRIBUTES, "chunk_checksum": sums}


FloatArray = npt.NDArray[np.float32]
HalfArray = npt.NDArray[np.float16]
# float16, or the type of another tier.
FeatureArray = npt.NDArray[Any]
RowArray = npt.NDArray[np.int64]
Shown = npt.NDArray[np.bool_]
"""Which classes every video shows, bool [n, classes]."""
