"""What becomes of a damaged store? Injects faults, reads everything, counts the outcomes.

After each fault the store is opened and all of it is read: names, labels, keys, times, class texts,
and the features memory-mapped, in bulk and through zarr. What comes back is compared with what was
written. Outcomes: `error` (a clear error before any number), `right` (everything that is shown is
right; a partition may be shown as not done), `WRONG` (any other number or name, or another kind of
exception). `verify` counts the faults that `mote-cli verify --deep` tells of. The rows go
into docs/reliability.md; the exit code is 1 when anything was wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import common
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from featstore import (
    ClassText,
    StoreSchema,
    StoreWriter,
    UserError,
    WorkError,
    open_store,
    verify,
)
from featstore.files.durable import write_bytes
from featstore.format.metadata import attributes_checksum
from featstore.rewriting.grow import add_class_text
from featstore.writing.shard_rows import FeatureRows
from tests.support.stores.sample_stores import (
    init_store,
    make_class_text,
    make_partition,
    make_provenance,
    make_store,
)

ROWS = (8, 5, 8)
SHAPE = (2, 4, 16)
SCHEMA = StoreSchema(len(ROWS), 8, *SHAPE, chunk_rows=2)
TOLD = (UserError, WorkError)

Answer = dict[str, Any]


def started(path: Path, seed: int = 0) -> StoreWriter:
    """A store without partitions, with the class texts of two prompt sets."""
    writer = init_store(path, SCHEMA, ROWS)
    text = make_class_text(SHAPE[-1])
    other = replace(
        text,
        embeddings=text.embeddings[::-1].copy(),
        sentences_hash=f"seed {seed}",
        templates=("a video of {}",),
        encoder_fingerprint=make_provenance().encoder_fingerprint,
    )
    add_class_text(path, "other", other)
    return writer


def pristine(path: Path, seed: int = 0) -> Path:
    """A finished store of three partitions with a failed sample each, four inner chunks a shard."""
    writer = started(path, seed)
    for tar, n in enumerate(ROWS):
        writer.write_partition(tar, make_partition(SCHEMA, tar, n, seed=seed, failed=[1]))
    return path


def answer(path: Path) -> Answer:
    """Everything the store says, by array row where it is about rows."""
    store = open_store(path)
    rows = store.rows
    told: Answer = {
        "names": (store.class_names, store.raw_class_names, store.split_names),
        "provenance": store.provenance,
        "tars": store.tars,
        "texts": {name: said_of(store.class_text(name)) for name in store.prompt_sets},
        "rows": rows.tolist(),
    }
    per_row: dict[str, Any] = {
        "key": store.keys,
        "reason": store.reasons,
        "label": store.labels,
        "status": store.status,
        "num_frames": store.num_frames,
        "fps": store.fps,
        "container_frames": store.container_frames,
        "damaged_packets": store.damaged_packets,
        "frame_index": store.frame_index(rows),
        "pts": store.pts(rows),
        "mapped": store.features(rows),
        "zarr": open_store(path, mapped=False).features(rows),
    }
    bulk = np.empty((len(rows), *SHAPE), np.float16)
    store.read_into(rows, bulk)
    per_row["bulk"] = bulk
    for name in store.split_names:
        per_row[f"split {name}"] = np.isin(rows, store.split(name))
    told["per row"] = {
        name: {row: np.asarray(value).tobytes() if name != "key" and name != "reason" else value
               for row, value in zip(rows.tolist(), values, strict=True)}
        for name, values in per_row.items()
    }  # fmt: skip
    return told


def said_of(text: ClassText) -> tuple[Any, ...]:
    """Class texts as something that can be compared."""
    said = text.names, text.sentences_hash, text.templates, text.encoder_fingerprint
    return *said, text.embeddings.tolist()


def agrees(found: Answer, truth: Answer) -> bool:
    """Whether nothing in `found` differs from the truth; partitions may be missing."""
    if any(found[name] != truth[name] for name in ("names", "provenance", "tars", "texts")):
        return False
    return all(
        found["per row"][name][row] == value[row]
        for name, value in truth["per row"].items()
        for row in found["rows"]
    )


class Table:
    """Counts outcomes by fault."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = {}
        self.wrong: list[str] = []

    def count(self, fault: str, outcome: str, what: str = "") -> None:
        self.outcomes.setdefault(fault, Counter())[outcome] += 1
        if outcome == "WRONG":
            self.wrong.append(f"{fault}: {what}")

    def judge(self, fault: str, path: Path, truth: Answer, what: str) -> None:
        """Read the store, which has the fault, and count what came of it."""
        try:
            outcome = "right" if agrees(answer(path), truth) else "WRONG"
        except TOLD:
            outcome = "error"
        except Exception as error:
            outcome, what = "WRONG", f"{what}: {error!r}"
        self.count(fault, outcome, what)
        try:
            told = not verify(path, deep=True).ok
        except TOLD:
            told = True
        self.outcomes[fault]["verify"] += told

    def rows(self) -> list[list[object]]:
        kinds = ("error", "right", "WRONG", "verify")
        return [
            [fault, sum(counts[k] for k in kinds[:3]), *(counts[k] for k in kinds)]
            for fault, counts in self.outcomes.items()
        ]


def files_of(store: Path) -> list[Path]:
    return sorted(p for p in store.rglob("*") if p.is_file())


def damage_files(table: Table, folder: Path, times: int, rng: random.Random) -> None:
    """Faults of single files: bits, lengths, absence, links."""
    store = pristine(folder / "store.zarr")
    truth = answer(store)
    files = files_of(store)
    outside = folder / "outside"

    def spoil(fault: str, file: Path, change: Callable[[bytes], bytes | None]) -> None:
        raw = file.read_bytes()
        changed = change(raw)
        file.unlink()
        if changed is not None:
            file.write_bytes(changed)
        table.judge(fault, store, truth, str(file.relative_to(store)))
        file.unlink(missing_ok=True)
        file.write_bytes(raw)

    def flipped(raw: bytes) -> bytes:
        at = rng.randrange(len(raw))
        return raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1 :]

    metadata = [file for file in files if file.name == "zarr.json"]
    features = [file for file in files if "features" in file.parts and file not in metadata]
    small = [file for file in files if file not in metadata and file not in features]
    for fault, group in (
        ("flipped bit in a features shard", features),
        ("flipped bit in another chunk", small),
        ("flipped bit in zarr.json", metadata),
    ):
        for number in range(times):
            spoil(fault, group[number % len(group)], flipped)
    for file in files:
        for _ in range(max(1, times // len(files))):
            spoil("truncated file", file, lambda raw: raw[: rng.randrange(1, len(raw))])
        spoil("zero-byte file", file, lambda raw: b"")
        spoil("missing file", file, lambda raw: None)
        raw = file.read_bytes()
        outside.write_bytes(raw)
        file.unlink()
        file.symlink_to(outside)
        table.judge("symbolic link to the outside", store, truth, str(file))
        file.unlink()
        os.mkfifo(file)
        table.judge("pipe in the place of a file", store, truth, str(file))
        file.unlink()
        file.mkdir()
        table.judge("folder in the place of a file", store, truth, str(file))
        file.rmdir()
        file.write_bytes(raw)


def swaps(table: Table, folder: Path) -> None:
    """Files of one partition in the place of another's, and of another store of the same make."""
    store, other = pristine(folder / "store.zarr"), pristine(folder / "other.zarr", seed=1)
    truth = answer(store)
    chunks = [file for file in files_of(store) if file.name != "zarr.json"]
    for file in chunks:
        array, _, tar, *_ = (*file.relative_to(store).parts, "", "")
        if array == "class_text":
            continue
        for another in range(len(ROWS)):
            place = file.relative_to(store).parts
            twin = store.joinpath(*place[:2], str(another), *place[3:])
            if int(tar) >= another:
                continue
            a, b = file.read_bytes(), twin.read_bytes()
            if a == b:
                continue
            file.write_bytes(b)
            twin.write_bytes(a)
            table.judge("chunk files of two partitions swapped", store, truth, str(file))
            file.write_bytes(a)
            twin.write_bytes(b)
        stale = (other / file.relative_to(store)).read_bytes()
        raw = file.read_bytes()
        if array in ("commit", "chunk_checksum") or stale == raw:
            continue
        file.write_bytes(stale)
        table.judge("chunk file of another store", store, truth, str(file))
        file.write_bytes(raw)
    for name in ("c/0/0", "zarr.json"):
        one, two = (store / "class_text" / texts / name for texts in ("mote28", "other"))
        a, b = one.read_bytes(), two.read_bytes()
        one.write_bytes(b)
        two.write_bytes(a)
        table.judge("files of two prompt sets swapped", store, truth, name)
        one.write_bytes(a)
        two.write_bytes(b)


def hostile(table: Table, folder: Path) -> None:
    """Stores that were made to harm."""
    store = pristine(folder / "store.zarr")
    truth = answer(store)
    group = store / "zarr.json"
    text = group.read_text()

    def attributes(fault: str, **changes: Any) -> None:
        node = json.loads(text)
        node["attributes"] |= changes
        node["attributes"]["checksum"] = attributes_checksum(node["attributes"])
        group.write_text(json.dumps(node))
        table.judge(fault, store, truth, str(changes)[:80])
        group.write_text(text)

    for version in (0, 2, 99, -1, "2", None, 1.5):
        attributes("another format version", format_version=version)
    sizes = SCHEMA.to_json()
    for bomb in (
        *({"schema": sizes | {name: 2**k}} for name in sizes for k in (31, 40, 62)),
        {"tars": [{}] * 100_000},
        {"class_names": ["x" * 2**20]},
        {"schema": sizes | {"capacity": 2**30, "chunk_rows": 1}},
        {"schema": sizes | {"capacity": 2**28, "chunk_rows": 2**28}},
    ):
        attributes("metadata bomb", **bomb)
    for name in ("zarr.json", "features/zarr.json", "key/zarr.json"):
        file = store / name
        raw = file.read_bytes()
        nested = raw.replace(
            b'"attributes": {', b'"attributes": {"x": ' + b"[" * 500 + b"]" * 500 + b","
        )
        for content in (b"[" * 10**6, b" " * (17 * 2**20), b'{"a":' * 10**5, nested):
            file.write_bytes(content)
            table.judge("metadata bomb", store, truth, name)
        file.write_bytes(raw)
    for key in ("../../etc/passwd", "/etc/passwd", "..", "a/../b", "\0"):
        tars = [{"file": key, "rows": n, "bytes": 1, "sha256": ""} for n in ROWS]
        truth_then = {**truth}
        try:
            attributes_then = json.loads(text)["attributes"] | {"tars": tars}
            attributes_then["checksum"] = attributes_checksum(attributes_then)
            group.write_text(json.dumps(json.loads(text) | {"attributes": attributes_then}))
            # Such names are shown as they are and never opened.
            truth_then["tars"] = open_store(store).tars
            with no_reading_outside(folder):
                table.judge("`..` and absolute names of tars", store, truth_then, key)
        finally:
            group.write_text(text)
        with mock.patch("featstore.format.metadata.prompt_set_names", return_value=[key]):
            try:
                open_store(store).class_text(key)
                table.count("`..` in a prompt set's name", "WRONG", key)
            except (UserError, WorkError):
                table.count("`..` in a prompt set's name", "error")
    second = folder / "v2.zarr"
    (second / "key").mkdir(parents=True)
    (second / ".zgroup").write_text('{"zarr_format": 2}')
    for filters in ([{"id": "pickle"}], [{"id": "vlen-utf8"}, {"id": "pickle"}]):
        array = {"zarr_format": 2, "shape": [1], "chunks": [1], "dtype": "|O", "filters": filters}
        (second / "key" / ".zarray").write_text(json.dumps(array))
        table.judge("Zarr v2 with a pickle filter", second, truth, str(filters))
    for codec in ("numcodecs.pickle", "pickle", "numcodecs.json2"):
        file = store / "key/zarr.json"
        raw = file.read_bytes()
        node = json.loads(raw)
        node["codecs"] = [{"name": codec, "configuration": {}}]
        file.write_text(json.dumps(node))
        table.judge("Zarr v3 with another codec", store, truth, codec)
        file.write_bytes(raw)


class no_reading_outside:
    """Fails when a file that is not under the folder is opened for its content."""

    def __init__(self, folder: Path) -> None:
        self.folder = os.path.realpath(folder)

    def __enter__(self) -> None:
        def guarded(opened: Callable[..., Any]) -> Callable[..., Any]:
            def inside(path: Any, *args: Any, **kwargs: Any) -> Any:
                real = "" if isinstance(path, int) else os.path.realpath(path)
                assert "passwd" not in real, real
                return opened(path, *args, **kwargs)

            return inside

        self.patches = [
            mock.patch("builtins.open", guarded(open)),
            mock.patch("os.open", guarded(os.open)),
        ]
        for patch in self.patches:
            patch.start()

    def __exit__(self, *error: object) -> None:
        for patch in self.patches:
            patch.stop()


def reading_while_writing(table: Table, folder: Path, rounds: int) -> None:
    """A reader opens and reads again and again while a writer adds and redoes partitions."""
    for codec in ("none", "zstd"):
        (folder / codec).mkdir()
        reading_beside(table, folder / codec, rounds // 2, replace(SCHEMA, codec=codec))


def reading_beside(table: Table, folder: Path, rounds: int, schema: StoreSchema) -> None:
    store = folder / "store.zarr"
    truths = [answer(pristine(folder / f"{seed}.zarr", seed)) for seed in (0, 1)]
    writer = init_store(store, schema, ROWS)
    stop = threading.Event()

    def write() -> None:
        generator = random.Random(1)
        while not stop.is_set():
            tar = generator.randrange(len(ROWS))
            seed = generator.randrange(2)
            writer.write_partition(
                tar, make_partition(SCHEMA, tar, ROWS[tar], seed=seed, failed=[1])
            )

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for number in range(rounds):
            fault = "reader while a writer adds and redoes partitions"
            try:
                reader = open_store(store)
                rows = reader.rows
                features = reader.features(rows)
                keys = reader.keys
            except TOLD as error:
                told = "was written anew" in str(error)  # what is sound is not called damaged
                table.count(fault, "error" if told else "WRONG", str(error))
                continue
            except Exception as error:
                table.count(fault, "WRONG", repr(error))
                continue
            for at, row in enumerate(rows.tolist()):
                allowed = [truth["per row"]["mapped"][row] for truth in truths]
                if features[at].tobytes() not in allowed:
                    table.count(fault, "WRONG", f"round {number}, row {row}")
                    break
                if keys[at] != truths[0]["per row"]["key"][row]:
                    table.count(fault, "WRONG", f"round {number}, key of row {row}")
                    break
            else:
                table.count(fault, "right")
    finally:
        stop.set()
        thread.join()


def interrupted_writes(table: Table, folder: Path) -> None:
    """The disk is full at each file of a partition; then a second writer comes."""
    truth = answer(pristine(folder / "whole.zarr"))
    partition = make_partition(SCHEMA, 1, ROWS[1], failed=[1])
    for name, redone in (("new", False), ("redone", True)):
        store = folder / f"{name}.zarr"
        writer = started(store)
        for tar in (0, 2, *([1] if redone else [])):
            writer.write_partition(tar, make_partition(SCHEMA, tar, ROWS[tar], seed=0, failed=[1]))
        for step in range(14):  # twelve small arrays, their checksums, the commit entry
            puts = iter(range(100))

            def full(path: Path, data: Any, step: int = step, puts: Iterator[int] = puts) -> None:
                if next(puts) == step:
                    raise OSError(28, "No space left on device")
                write_bytes(path, data)

            with (
                mock.patch("featstore.writing.shard_rows.write_bytes", full),
                contextlib.suppress(OSError),
            ):
                StoreWriter.open(store).write_partition(1, partition)
            table.judge("disk full while a partition is written", store, truth, f"{name} {step}")
            if StoreWriter.open(store).pending() != [1]:
                table.count("disk full while a partition is written", "WRONG", f"pending {step}")
        # The shard is the first thing written; when there is no room for it, nothing has gone yet.
        before = StoreWriter.open(store).pending()
        full_shard = mock.patch.object(FeatureRows, "put_all", side_effect=OSError(28, "No space"))
        with full_shard, contextlib.suppress(OSError):
            StoreWriter.open(store).write_partition(1, partition)
        table.judge("disk full while a partition is written", store, truth, f"{name} shard")
        if StoreWriter.open(store).pending() != before:
            table.count("disk full while a partition is written", "WRONG", "the shard")
        with StoreWriter.open(store).claim([0]):
            try:
                with StoreWriter.open(store).claim([0, 1]):
                    table.count("two writers of one partition", "WRONG", name)
            except WorkError:
                table.count("two writers of one partition", "error")
        with StoreWriter.open(store).claim():
            writer.write_partition(1, partition)
        table.judge("a writer goes on after a full disk", store, truth, name)


def kills(table: Table, folder: Path, rounds: int) -> None:
    """Processes killed with SIGKILL before every system call of a write, and at any moment."""
    driver = Path(__file__).parent.parent / "tests/featstore/writing/crash_driver.py"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    for arguments in (("stepwise", "0", "1"), ("anytime", str(rounds))):
        place = folder / arguments[0]
        place.mkdir()
        ran = subprocess.run(
            [sys.executable, str(driver), str(place), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        fault = "writer killed (SIGKILL), then checked and redone"
        if ran.returncode:
            table.count(fault, "WRONG", ran.stderr[-300:])
            continue
        for _ in range(sum(json.loads(ran.stdout).values())):
            table.count(fault, "right")


def main() -> None:
    """Inject all faults and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=600, help="bit flips of each kind")
    parser.add_argument("--rounds", type=int, default=300, help="readings beside a writer")
    parser.add_argument("--kills", type=int, default=50, help="kills at any moment; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    table = Table()
    rng = random.Random(chosen.seed)
    with tempfile.TemporaryDirectory() as name, mock.patch("os.fsync"):
        folder = Path(name)

        def fresh() -> Path:
            place = folder / "work"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            return place

        make_store(folder / "warm.zarr")
        damage_files(table, fresh(), chosen.times, rng)
        swaps(table, fresh())
        hostile(table, fresh())
        reading_while_writing(table, fresh(), chosen.rounds)
        interrupted_writes(table, fresh())
        if chosen.kills:
            kills(table, fresh(), chosen.kills)
    header = ["fault", "times", "error", "right", "wrong", "verify --deep tells"]
    common.table(header, table.rows())
    where = common.machine()
    print(f"\nfor docs/reliability.md ({where['date'][:10]}):")
    for fault, times, error, right, wrong, told in table.rows():
        print(f"| {fault} | {times} | {error} | {right} | {wrong} | {told} |")
    for line in table.wrong[:50]:
        print(f"WRONG: {line}", file=sys.stderr)
    common.RESULTS.mkdir(parents=True, exist_ok=True)
    result = {"machine": where, "faults": {f: dict(c) for f, c in table.outcomes.items()}}
    (common.RESULTS / "faults.json").write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(table.wrong))


if __name__ == "__main__":
    main()
