"""Writes rows of a store as a Parquet table that Arrow and Hugging Face `datasets` can read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from featstore.errors import UserError
from featstore.reading.store import Store

try:
    import pyarrow
    import pyarrow.parquet
except ImportError as missing:
    raise UserError(
        "Parquet needs pyarrow, which is not installed: `pip install 'mote-video[share]'`, or "
        "choose safetensors or npy"
    ) from missing


def table_bytes(rows: Mapping[str, Any], store: Store) -> bytes:
    """Return a Parquet file with the columns of an export.

    `features`, `frame_index` and `pts` are lists of fixed size (of sequences: of any size),
    flattened in C order; the schema's metadata holds their shapes (of sequences: of a frame) under
    "mote", and under "huggingface" what `datasets` needs to know labels by name.
    """
    strings = pyarrow.string()
    types = {"key": strings, "label": pyarrow.int64(), "class_name": strings}
    types |= {"splits": pyarrow.list_(strings), "num_frames": pyarrow.int32()}
    types |= {"fps": pyarrow.float32()}
    types |= {"spans": strings} if store.multi_label else {}
    whole = {"first": pyarrow.int64(), "length": pyarrow.int64()} if store.sequences else {}
    types |= whole
    columns = {name: pyarrow.array(rows[name], kind) for name, kind in types.items()}
    text = {"dtype": "string", "_type": "Value"}
    described: dict[str, Any] = {  # the columns in the words of `datasets`
        "key": text,
        "label": {"names": store.class_names, "_type": "ClassLabel"},
        "class_name": text,
        **({"spans": text} if store.multi_label else {}),
        "splits": {"feature": text, "_type": "Sequence"},
        "num_frames": {"dtype": "int32", "_type": "Value"},
        "fps": {"dtype": "float32", "_type": "Value"},
        **{name: {"dtype": "int64", "_type": "Value"} for name in whole},
    }
    for name in ("frame_index", "pts", "features"):
        flat = pyarrow.array(rows[name].reshape(-1))
        length = math.prod(rows[name].shape[1:])
        if store.sequences:
            ends = np.cumsum([0, *rows["length"]]) * length
            columns[name] = pyarrow.LargeListArray.from_arrays(ends, flat)
            length = -1
        else:
            columns[name] = pyarrow.FixedSizeListArray.from_arrays(flat, length)
        value = {"dtype": str(rows[name].dtype), "_type": "Value"}
        described[name] = {"feature": value, "length": length, "_type": "Sequence"}
    mote = {
        "shapes": {name: list(rows[name].shape[1:]) for name in ("features", "frame_index", "pts")},
        "class_names": store.class_names,
        "provenance": store.provenance.to_json(),
    }
    metadata = {
        "mote": json.dumps(mote),
        "huggingface": json.dumps({"info": {"features": described}}),
    }
    table = pyarrow.table(columns).replace_schema_metadata(metadata)
    sink = pyarrow.BufferOutputStream()
    # float16 hardly compresses, and dictionaries of it only cost.
    pyarrow.parquet.write_table(
        table, sink, compression="zstd", use_dictionary=["class_name"], row_group_size=256
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data
