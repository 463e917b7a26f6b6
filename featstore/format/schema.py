"""The arrays of a feature store, described as data: names, shapes, types, chunks, codecs, units.

Dimension letters: N rows = tars x capacity, V views, F frames, D dim of the embedding. Where
docstrings say [V, F, D] for features, a store of another tier has [V, F, *item]
(`featstore.format.tiers`).

A store of sequences has rows of their own length over one flat axis of frames, of which every tar
has a part of `frame_capacity`. Its features, `pts` and `frame_index` are sharded along that axis in
blocks of equally many frames; V is the number of crops.

Row `tar * capacity + position` belongs to sample `position` of tar `tar`. Each tar has exactly one
chunk (shard) file of every array, so that partitions never share a file. The metadata files are
written from these specifications, and every store is checked against them before a chunk is read.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from featstore.errors import UserError
from featstore.format.array_spec import (
    BYTES_CODEC,
    CRC_CODEC,
    SINGLE_BYTES_CODEC,
    VLEN_CODEC,
    ZSTD_CODEC,
    ArraySpec,
    ShardShape,
)
from featstore.format.tiers import EMBEDDINGS, Tier

FORMAT_NAME: Final = "mote-features"
FORMAT_VERSION: Final = 2
"""The newest version. A store of fixed rows is of version 1, which earlier readers read."""

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
BLOSC_LEVEL: Final = {"zstd": 1, "lz4": 5}
# The type of one stored number of the features: float16, int8 with a scale per dimension, uint8 for
# pixels, or float32 for motions.
FEATURE_TYPES: Final = ("float16", "int8", "uint8", "float32")
# This number stands for NaN, which int8 lacks; the quantised numbers are -127..127.
INT8_MISSING: Final = -128

# These limits are far beyond any data set and still need little memory: a reader keeps 13 bytes per
# inner chunk, and one decoded chunk. Blosc cannot make larger chunks either.
MAX_CHUNKS: Final = 2**24
MAX_CHUNK_BYTES: Final = 2**31 - 1
MAX_FRAMES: Final = 2**40  # of all sequences of a store
# A part of the axis of frames that is not used costs 16 bytes a block, so there is room for 2.9
# hours at 25 frames a second even where the videos of the first tars are short.
LEAST_FRAME_CAPACITY: Final = 2**18
FEATURE_SCALE: Final = "feature_scale"
CLASS_TEXT_GROUP: Final = "class_text"

COMMIT_ENTRIES: Final = ("rows", "checksum_crc32c", "features_bytes", "unix_time")
_SEQUENCE_ENTRIES: Final = (*COMMIT_ENTRIES, "frames")

SPANS: Final = "spans"
"""The array that only stores of several classes a video have."""
GAPS: Final = "gaps"
_SEQUENCE_ARRAYS: Final = (GAPS, "first_frame", "length")
"""The small arrays that only stores of sequences have."""
FRAME_ARRAYS: Final = ("features", "pts", "frame_index")
"""The arrays along the flat axis of frames, in the order of the columns of `checksum`."""
# For the two of them that are always there: data type, fill value, units.
_FRAME_NUMBERS: Final[dict[str, tuple[str, int | str, str]]] = {
    "pts": ("float64", "NaN", "seconds"),
    "frame_index": ("int32", -1, "frames"),
}

_ROW: Final = ("row",)
_FRAME: Final = ("row", "view", "frame")
# The arrays with one small chunk per tar, in the order in which they are written. For each: data
# type, fill value, dimensions, units.
_CHUNK_PER_TAR: Final[dict[str, tuple[str, int | str, tuple[str, ...], str]]] = {
    "key": ("string", "", _ROW, ""),
    "reason": ("string", "", _ROW, ""),
    "label": ("int32", -1, _ROW, ""),
    SPANS: ("string", "", _ROW, ""),
    GAPS: ("string", "", _ROW, ""),
    "num_frames": ("int32", 0, _ROW, "frames"),
    "fps": ("float32", "NaN", _ROW, "frames per second"),
    "status": ("uint8", STATUS_EMPTY, _ROW, ""),
    "splits": ("uint32", 0, _ROW, ""),
    "container_frames": ("int32", 0, _ROW, "frames"),
    "damaged_packets": ("int32", 0, _ROW, "packets"),
    "first_frame": ("int64", 0, _ROW, "frames"),
    "length": ("int64", 0, _ROW, "frames"),
    "frame_index": ("int32", -1, _FRAME, "frames"),
    "pts": ("float64", "NaN", _FRAME, "seconds"),
    "checksum": ("uint32", 0, _ROW, ""),
    "chunk_checksum": ("uint32", 0, ("tar", "small_array"), ""),
    "commit": ("uint64", 0, ("tar", "entry"), ""),
}
SOME_HAVE: Final = (SPANS, *_SEQUENCE_ARRAYS)
"""The arrays with one file per partition that only some stores have."""
# Those that every store has.
PARTITION_ARRAYS: Final = (*(name for name in _CHUNK_PER_TAR if name not in SOME_HAVE), "features")

# The codecs of small arrays by data type; all other types use the codecs of multi-byte numbers.
_CODECS: Final = {
    "string": (VLEN_CODEC, ZSTD_CODEC, CRC_CODEC),
    "uint8": (SINGLE_BYTES_CODEC, CRC_CODEC),
}


@dataclass(frozen=True)
class StoreSchema:
    """The sizes that determine every array of a store.

    There are `tars` partitions of `capacity` rows. Each row of features is [views, frames, *item].
    An inner chunk of the features has `chunk_rows` rows, a divisor of `capacity`. `dim` is the
    width of the class texts. `codec` compresses the features, and `feature_type` is the type they
    are stored as; int8 is read as float16. `tier` says what an item is (`featstore.format.tiers`):
    by default an embedding [dim], for which `item` may be left out. With `multi_label` a video may
    show several classes, which the array `spans` holds.

    With a `frame_capacity` the store holds sequences: a partition has room for so many frames, a
    frame is [views, *item] (or [*item] with one view) and a line of the features, `frames` is 1,
    and `chunk_rows`, a divisor of `frame_capacity`, counts frames.
    Raises ValueError if a size is not positive, `chunk_rows` is no divisor, codec, type or tier is
    unknown, or they do not fit.
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
    frame_capacity: int = 0

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
        if type(self.frame_capacity) is not int or self.frame_capacity < 0:
            raise ValueError(f"frame_capacity is {self.frame_capacity!r}: it must be a size")
        if self.lines % self.chunk_rows:
            raise ValueError(f"chunk_rows {self.chunk_rows} does not divide the {self.lines} lines")
        if self.sequences and (self.frames != 1 or self.lines * self.tars > MAX_FRAMES):
            raise ValueError("sequences have 1 frame a line, and at most 2**40 lines")
        if tier.of_sequences and not self.sequences:
            raise ValueError(f"{tier.text} is kept as sequences only")
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
        most_frames: int | None = None,
    ) -> StoreSchema:
        """Make a schema whose inner chunks are as large as possible, up to about 1.5 MB.

        With `most_frames` it is of sequences, of which a partition must have room for so many
        frames; `frames` is then 1.
        """
        kind = Tier.parse(tier).feature_types[0]
        row_bytes = views * frames * math.prod(item or (dim,)) * np.dtype(kind).itemsize
        wanted = max(1, TARGET_CHUNK_BYTES // max(1, row_bytes))
        if most_frames is None:
            wanted, frame_capacity = min(capacity, wanted), 0
            chunk_rows = next((n for n in range(wanted, 0, -1) if capacity % n == 0), 1)
        else:
            chunk_rows = wanted
            frame_capacity = -(-max(LEAST_FRAME_CAPACITY, most_frames) // wanted) * wanted
        return cls(
            *(tars, capacity, views, frames, dim, chunk_rows),
            feature_type=kind,
            tier=tier,
            item=item,
            multi_label=multi_label,
            frame_capacity=frame_capacity,
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
        without = {"commit", *(() if self.multi_label else (SPANS,))}
        without |= {*(_FRAME_NUMBERS if self.sequences else _SEQUENCE_ARRAYS)}
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
        frame_numbers = tuple(_FRAME_NUMBERS) if self.sequences else ()
        return (*self.per_tar_arrays, *frame_numbers, "features", "commit")

    @property
    def version(self) -> int:
        """The version of the format that such a store has: the first that has what it needs."""
        return 2 if self.sequences else 1

    @property
    def sequences(self) -> bool:
        """Whether rows have their own length, over a flat axis of frames."""
        return self.frame_capacity > 0

    @property
    def lines(self) -> int:
        """The lines of features that a partition has room for: frames of sequences, else rows."""
        return self.frame_capacity or self.capacity

    @property
    def commit_entries(self) -> tuple[str, ...]:
        """The numbers of a commit entry."""
        return _SEQUENCE_ENTRIES if self.sequences else COMMIT_ENTRIES

    @cached_property
    def sharded(self) -> dict[str, ShardShape]:
        """The shapes of the shards of all arrays that are sharded."""
        features = ShardShape(
            *(self.tars, self.lines, self.chunk_rows, self.row_shape, self.feature_type),
            codec=self.codec,
            fill={"int8": INT8_MISSING, "uint8": 0}.get(self.feature_type, "NaN"),
        )
        if not self.sequences:
            return {"features": features}
        numbers = {
            name: ShardShape(self.tars, self.lines, self.chunk_rows, (), dtype, "none", fill)
            for name, (dtype, fill, _) in _FRAME_NUMBERS.items()
        }
        return {"features": features, **numbers}

    @property
    def rows(self) -> int:
        """N, the number of rows of every array, filled or not."""
        return self.tars * self.capacity

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape (views, frames, *item) of one row of features.

        Of sequences, the shape of a frame: (views, *item), or *item if there is one view.
        """
        if self.sequences:
            return (self.views, *self.item) if self.views > 1 else self.item
        return self.views, self.frames, *self.item

    @property
    def row_bytes(self) -> int:
        """The size in bytes of one row of features (of sequences: of one frame) in memory."""
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
        return self.sharded["features"].chunk_bytes

    @property
    def chunks_per_shard(self) -> int:
        """The number of inner chunks in one shard of the features."""
        return self.sharded["features"].chunks_per_shard

    def shard_bytes(self, rows: int) -> int:
        """Return the size in bytes of the features file of so many rows (frames of sequences).

        Inner chunks that hold no listed row are absent from the shard. With a codec, the result is
        the largest size that the file can have.
        """
        return self.sharded["features"].shard_bytes(rows)

    def arrays(self) -> dict[str, ArraySpec]:
        """Return every array of the store except the class texts (see `class_text_spec`)."""
        item = Tier.parse(self.tier).dimension_names
        first = ("frame", *(("crop",) if self.views > 1 else ())) if self.sequences else _FRAME
        arrays = {"features": self._sharded_spec("features", self._feature_codecs(), first + item)}
        for name in self.sharded.keys() - arrays.keys():
            units = _FRAME_NUMBERS[name][2]
            arrays[name] = self._sharded_spec(name, (BYTES_CODEC, CRC_CODEC), ("frame",), units)
        # For each dimension: the size of the array and the size of a chunk.
        sizes = {
            "row": (self.rows, self.capacity),
            "tar": (self.tars, 1),
            "view": (self.views, self.views),
            "frame": (self.frames, self.frames),
            "small_array": (len(self.small_arrays), len(self.small_arrays)),
            "entry": (len(self.commit_entries), len(self.commit_entries)),
            "block": (self.tars * self.chunks_per_shard, self.chunks_per_shard),
            "frame_array": (len(FRAME_ARRAYS), len(FRAME_ARRAYS)),
        }
        for array in (*self.per_tar_arrays, "commit"):
            dtype, fill, names, units = _CHUNK_PER_TAR[array]
            if self.sequences and array == "checksum":
                names = ("block", "frame_array")
            shape, chunks = zip(*(sizes[name] for name in names), strict=True)
            codecs = _CODECS.get(dtype, (BYTES_CODEC, CRC_CODEC))
            arrays[array] = ArraySpec(shape, dtype, chunks, None, fill, codecs, names, units)
        if self.quantised:
            scale = (self.dim,)
            arrays[FEATURE_SCALE] = ArraySpec(
                scale, "float32", scale, None, "NaN", (BYTES_CODEC, CRC_CODEC), ("dim",), ""
            )
        return arrays

    def _sharded_spec(
        self, name: str, codecs: tuple[dict[str, Any], ...], names: tuple[str, ...], units: str = ""
    ) -> ArraySpec:
        shape = self.sharded[name]
        return ArraySpec(
            shape=(self.tars * shape.lines, *shape.row_shape),
            dtype=shape.stored,
            chunks=(shape.chunk_rows, *shape.row_shape),
            shards=(shape.lines, *shape.row_shape),
            fill=shape.fill,
            codecs=codecs,
            dimension_names=names,
            units=units,
        )

    def _feature_codecs(self) -> tuple[dict[str, Any], ...]:
        width = np.dtype(self.feature_type).itemsize
        plain = SINGLE_BYTES_CODEC if width == 1 else BYTES_CODEC
        if self.codec == "none":
            return plain, CRC_CODEC
        blosc = {
            "name": "blosc",
            "configuration": {
                "typesize": width,
                "cname": self.codec,
                "clevel": BLOSC_LEVEL[self.codec],
                "shuffle": "bitshuffle",
                "blocksize": 0,
            },
        }
        return plain, blosc, CRC_CODEC


def class_text_spec(classes: int, dim: int) -> ArraySpec:
    """Describe `class_text/<prompt set>`: float32 [classes, dim], rows of length 1, one chunk."""
    shape = (classes, dim)
    return ArraySpec(
        shape, "float32", shape, None, "NaN", (BYTES_CODEC, CRC_CODEC), ("class", "dim"), ""
    )


# These attributes tell readers that do not know this package what the numbers of some arrays mean.
_ATTRIBUTES: Final[dict[str, dict[str, Any]]] = {
    FEATURE_SCALE: {"meaning": "features x scale, in float16; -128 stands for NaN"},
    "commit": {"entries": list(COMMIT_ENTRIES)},
    "checksum": {"algorithm": "crc32c of the row's features"},
    "status": {"meaning": {"empty": STATUS_EMPTY, "ok": STATUS_OK, "failed": STATUS_FAILED}},
    "splits": {"meaning": "bit i is set when the row belongs to split_names[i]"},
    SPANS: {"meaning": "JSON of [label] or [label, start, end], the times in seconds"},
}
_OF_SEQUENCES: Final[dict[str, dict[str, Any]]] = {
    GAPS: {"meaning": "JSON of [start, end, reason], the times in seconds"},
    "first_frame": {"meaning": "the row's first frame, counted from tar x frame_capacity"},
    "commit": {"entries": list(_SEQUENCE_ENTRIES)},
    "checksum": {"algorithm": "crc32c of a block's frames", "arrays": list(FRAME_ARRAYS)},
}


def array_attributes(schema: StoreSchema) -> dict[str, dict[str, Any]]:
    """Return the attributes of the arrays of a store by array; most arrays have none."""
    sums = {"arrays": list(schema.small_arrays), "algorithm": "crc32c of the chunk file"}
    later = _OF_SEQUENCES if schema.sequences else {}
    return {**_ATTRIBUTES, **later, "chunk_checksum": sums}


FloatArray = npt.NDArray[np.float32]
HalfArray = npt.NDArray[np.float16]
# float16, or the type of another tier.
FeatureArray = npt.NDArray[Any]
RowArray = npt.NDArray[np.int64]
Shown = npt.NDArray[np.bool_]
"""Which classes every video shows, bool [n, classes]."""
