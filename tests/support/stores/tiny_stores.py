"""Makes the stores of tests/data/stores, one per format version; run once per version.

`python -m tests.support.stores.tiny_stores FOLDER` writes v1.zarr, v1-int8-zstd.zarr and what they
hold, `v1.json`, and the same of sequences as v2. Stores of a released version are never made again:
they stand for those on users' disks.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from featstore import Store, open_store
from featstore.rewriting.convert import convert
from featstore.rewriting.quantize import quantize
from tests.support.stores.sample_stores import make_store
from tests.support.stores.sequence_stores import make_sequence_store


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
        **(_sequences(store) if store.sequences else _fixed_rows(store)),
        "class_text": {
            "names": list(text.names),
            "sentences_hash": text.sentences_hash,
            "embeddings": text.embeddings.astype("<f4").tobytes().hex(),
        },
    }


def _fixed_rows(store: Store) -> dict[str, Any]:
    return {
        "frame_index": store.frame_index(store.rows).tolist(),
        "pts": store.pts(store.rows).astype("<f8").tobytes().hex(),
        "features": store.features(store.rows).astype("<f2").tobytes().hex(),
    }


def _sequences(store: Store) -> dict[str, Any]:
    rows = store.rows.tolist()
    return {
        "lengths": store.lengths.tolist(),
        "gaps": [[[*gap] for gap in gaps] for gaps in store.gaps],
        "frame_index": [store.sequence_frames(row).tolist() for row in rows],
        "pts": [store.sequence_times(row).astype("<f8").tobytes().hex() for row in rows],
        "features": [store.sequence(row).astype("<f2").tobytes().hex() for row in rows],
    }


def main(folder: Path) -> None:
    for version in (1, 2):
        plain, small = folder / f"v{version}.zarr", folder / f"v{version}-int8-zstd.zarr"
        if version == 1:
            make_store(plain, rows=(3, 2), capacity=3, row_shape=(1, 2, 4))
        else:
            make_sequence_store(plain, ((9, 0, 3), (4, 1)), crops=3, dim=4, block=4, room=4)
        quantize(plain, folder / "q.zarr")
        convert(folder / "q.zarr", small, "zstd")
        shutil.rmtree(folder / "q.zarr")
        held = {path.name: content(path) for path in (plain, small)}
        (folder / f"v{version}.json").write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
