"""Rows of a store as a Parquet table that Arrow and Hugging Face `datasets` read."""

from __future__ import annotations

import json
import math
from typing import Any

from featstore.errors import UserError
from featstore.reading.store import Store
from featstore.rewriting.export_rows import Rows

try:
    import pyarrow
    import pyarrow.parquet
except ImportError as missing:
    raise UserError(
        "Parquet needs pyarrow, which is not installed: `pip install 'mote-video[share]'`, or "
        "choose safetensors or npy"
    ) from missing


def table_bytes(rows: Rows, store: Store) -> bytes:
    """A Parquet file of these rows.

    `features`, `frame_index` and `pts` are lists of fixed size, flattened in C order; the
    schema's metadata holds their shapes under "mote", and under "huggingface" what `datasets`
    needs to know labels by name.
    """
    shape = store.schema.row_shape
    features = rows.features.reshape(len(rows.key), -1)
    columns = {
        "key": pyarrow.array(rows.key, pyarrow.string()),
        "label": pyarrow.array(rows.label, pyarrow.int64()),
        "class_name": pyarrow.array(rows.class_name, pyarrow.string()),
        "splits": pyarrow.array(rows.splits, pyarrow.list_(pyarrow.string())),
        "num_frames": pyarrow.array(rows.num_frames),
        "fps": pyarrow.array(rows.fps),
        "frame_index": _fixed(rows.frame_index.reshape(len(rows.key), -1)),
        "pts": _fixed(rows.pts.reshape(len(rows.key), -1)),
        "features": _fixed(features),
    }
    metadata = {
        "mote": json.dumps(
            {
                "shapes": {
                    "features": list(shape),
                    "frame_index": list(shape[:2]),
                    "pts": list(shape[:2]),
                },
                "class_names": store.class_names,
                "provenance": store.provenance.to_json(),
            }
        ),
        "huggingface": json.dumps({"info": {"features": _described(store)}}),
    }
    table = pyarrow.table(columns).replace_schema_metadata(metadata)
    sink = pyarrow.BufferOutputStream()
    # float16 hardly compresses, and dictionaries of it only cost.
    pyarrow.parquet.write_table(
        table, sink, compression="zstd", use_dictionary=["class_name"], row_group_size=256
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def _fixed(values: Any) -> Any:
    """A list of fixed size per row of an array [n, numbers]."""
    return pyarrow.FixedSizeListArray.from_arrays(
        pyarrow.array(values.reshape(-1)), values.shape[1]
    )


def _described(store: Store) -> dict[str, Any]:
    """The columns in the words of `datasets`."""

    def value(dtype: str) -> dict[str, Any]:
        return {"dtype": dtype, "_type": "Value"}

    def fixed(dtype: str, length: int) -> dict[str, Any]:
        return {"feature": value(dtype), "length": length, "_type": "Sequence"}

    schema = store.schema
    views, frames = schema.views, schema.frames
    return {
        "key": value("string"),
        "label": {"names": store.class_names, "_type": "ClassLabel"},
        "class_name": value("string"),
        "splits": {"feature": value("string"), "_type": "Sequence"},
        "num_frames": value("int32"),
        "fps": value("float32"),
        "frame_index": fixed("int32", views * frames),
        "pts": fixed("float64", views * frames),
        "features": fixed(str(schema.dtype), math.prod(schema.row_shape)),
    }
