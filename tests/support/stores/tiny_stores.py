"""Makes the stores of tests/data/stores, one per format version; run once per version.

`python -m tests.support.stores.tiny_stores FOLDER` writes v1.zarr, v1-int8-zstd.zarr and what they
hold, `v1.json`. Stores of a released version are never made again: they stand for those on users'
disks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from featstore import open_store
from featstore.rewriting.convert import convert
from featstore.rewriting.quantize import quantize
from tests.support.stores.sample_stores import make_store

VERSION = 1


def content(path: Path) -> dict[str, Any]:
    """All that a store holds, as JSON; numbers of features as the hexadecimal of their bytes."""
    store = open_store(path)
    rows = store.rows
    text = store.class_text("mote28")
    return {
        "attributes": json.loads((path / "zarr.json").read_bytes())["attributes"],
        "rows": rows.tolist(),
        "keys": store.keys,
        "reasons": store.reasons,
        **{
            name: getattr(store, name).astype("<f8").tolist()
            for name in (
                *("labels", "num_frames", "fps", "status"),
                *("container_frames", "damaged_packets"),
            )
        },
        "splits": {name: store.split(name).tolist() for name in store.split_names},
        "frame_index": store.frame_index(rows).tolist(),
        "pts": store.pts(rows).astype("<f8").tobytes().hex(),
        "features": store.features(rows).astype("<f2").tobytes().hex(),
        "class_text": {
            "names": list(text.names),
            "sentences_hash": text.sentences_hash,
            "embeddings": text.embeddings.astype("<f4").tobytes().hex(),
        },
    }


def main(folder: Path) -> None:
    plain, small = folder / f"v{VERSION}.zarr", folder / f"v{VERSION}-int8-zstd.zarr"
    make_store(plain, rows=(3, 2), capacity=3, row_shape=(1, 2, 4))
    quantize(plain, folder / "q.zarr")
    convert(folder / "q.zarr", small, "zstd")
    held = {path.name: content(path) for path in (plain, small)}
    (folder / f"v{VERSION}.json").write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
