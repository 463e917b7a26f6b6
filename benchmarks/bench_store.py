"""How fast is the feature store beside raw arrays? Loading, batches, verification, opening, growth.

Every baseline is measured in the same run, in turn with what it is compared with: `np.load` of
the same bytes, a bare `index_select` with ready-made indices, plain reads with one crc32c. Times
are CPU seconds of the process (user and system, all threads) with one torch thread: they say what
one core can do and suffer least from other programs; ratios of wall-clock times are kept beside
them. Files are in the page cache unless a line says "cold".
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from featstore import (
    ClassText,
    Partition,
    Provenance,
    Store,
    StoreSchema,
    StoreWriter,
    open_store,
    verify,
)
from featstore.batches.loader import FeatureLoader, MappedFeatures, StreamedFeatures, resident
from featstore.batches.streaming import POOL_BYTES
from featstore.format.checksums import crc32c
from featstore.format.metadata import StoreMetadata, TarEntry
from featstore.segments import SegmentSampler

DIM, STORED, FRAMES, BATCH = 512, 32, 8, 256
TAR_ROWS = 1000
KINETICS_TARS = 240

Times = dict[str, list[tuple[float, float]]]  # by contestant: (CPU seconds, wall seconds)


def make(path: Path, tars: int, frames: int, *, distinct: int) -> Store:
    """A store of `tars` tars; partitions after the first `distinct` are copies of those.

    With `distinct` 0 all features are zeros in files with holes, which take next to no disk.
    """
    if path.exists():
        return open_store(path)
    unfinished = common.fresh(path.with_suffix(".making"))
    made = unfinished / path.name
    names = tuple(f"class {i}" for i in range(400))
    text = np.eye(len(names), DIM, dtype=np.float32)
    writer = StoreWriter.init(
        made,
        StoreMetadata(
            StoreSchema.create(tars, TAR_ROWS, 1, frames, DIM),
            Provenance("random", "0" * 64, DIM, 100.0, "fp32", f"uniform:{frames}", 1, {}, "none"),
            tuple(TarEntry(f"{i:06d}.tar", TAR_ROWS, 1, "0" * 64) for i in range(tars)),
            *(names, names, ("train",)),
        ),
        {"name": ClassText(names, text, "0" * 64)},
    )
    rng = np.random.default_rng(0)
    for tar in range(max(1, distinct)):
        writer.write_partition(tar, partition(rng, tar, frames, zeros=distinct == 0))
    originals = max(1, distinct)
    for tar in range(originals, tars):
        for chunk in made.glob(f"*/c/{tar % originals}"):
            copy_with_holes(chunk, chunk.with_name(str(tar)))
    made.rename(path)
    return open_store(path)


def partition(rng: np.random.Generator, tar: int, frames: int, zeros: bool) -> Partition:
    shape = (TAR_ROWS, 1, frames, DIM)
    index = np.broadcast_to(np.arange(frames, dtype=np.int32), shape[:3])
    numbers = np.zeros(shape) if zeros else rng.standard_normal(shape, np.float32)
    return Partition(
        key=[f"{tar}-{i}" for i in range(TAR_ROWS)],
        label=rng.integers(0, 400, TAR_ROWS).astype(np.int32),
        num_frames=np.full(TAR_ROWS, frames, np.int32),
        fps=np.full(TAR_ROWS, 25, np.float32),
        status=np.ones(TAR_ROWS, np.uint8),
        splits=np.ones(TAR_ROWS, np.uint32),
        container_frames=np.full(TAR_ROWS, frames, np.int32),
        damaged_packets=np.zeros(TAR_ROWS, np.int32),
        reason=[""] * TAR_ROWS,
        frame_index=index.copy(),
        pts=index / 25.0,
        features=numbers.astype(np.float16),
    )


def copy_with_holes(source: Path, target: Path) -> None:
    """Copy a file or folder; pages of zeros become holes."""
    if source.is_dir():
        for file in [p for p in source.rglob("*") if p.is_file()]:
            copy_with_holes(file, target / file.relative_to(source))
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    raw = source.read_bytes()
    with open(target, "wb") as file:
        file.truncate(len(raw))
        for at in range(0, len(raw), 4096):
            if any(page := raw[at : at + 4096]):
                file.seek(at)
                file.write(page)


def in_turn(work: dict[str, Callable[[], Any]], rounds: int) -> Times:
    """Run each contestant once per round after one round to warm up.

    Rounds have orders of their own: nobody always finds the caches that a certain other one leaves.
    """
    times: Times = {name: [] for name in work}
    orders = random.Random(0)
    for number in range(rounds + 1):
        for name, run in orders.sample(list(work.items()), len(work)):
            cpu, wall = time.process_time(), time.perf_counter()
            result = run()
            spent = time.process_time() - cpu, time.perf_counter() - wall
            del result  # before the next one takes its memory
            if number:
                times[name].append(spent)
    return times


def ratio(times: Times, name: str, baseline: str, column: int = 0) -> float:
    """Median over the rounds of baseline's time over the contestant's: how fast it is beside it."""
    pairs = zip(times[name], times[baseline], strict=True)
    return common.middle([theirs[column] / ours[column] for ours, theirs in pairs])


def seconds(times: Times, name: str) -> float:
    return common.middle([spent[0] for spent in times[name]])


def cold(path: Path) -> None:
    """Put a file, or the files under a folder, out of the page cache."""
    os.sync()
    for file in [path, *path.rglob("*")]:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


class Bench:
    """Collects rows and details of all parts."""

    def __init__(self) -> None:
        self.rows: list[common.Row] = []
        self.details: dict[str, Any] = {}

    def add(self, part: str, times: Times, baseline: str, unit: str, amount: float, **limits: str):
        """Print a part's table; `limits` by contestant ("-" for "_")."""
        shown = []
        for name in times:
            rate = amount / seconds(times, name)
            beside = [ratio(times, name, baseline, column) for column in (0, 1)]
            shown.append([name, rate, *beside])
            limit = limits.get(name.replace(" ", "_").replace(",", "").replace("-", "_"))
            if limit is not None:
                self.rows.append(
                    common.Row(
                        f"{part}: {name}, against {baseline}",
                        f"{rate:.4g} {unit}",
                        f"{amount / seconds(times, baseline):.4g} {unit}",
                        beside[0],
                        limit,
                    )
                )
        print()
        common.table([part, unit, "CPU ratio", "wall ratio"], shown)
        self.details[part] = {"times": times, "baseline": baseline, "amount": amount, "unit": unit}


def loading(bench: Bench, store: Store, rounds: int) -> None:
    array = store.path.with_suffix(".npy")
    if not array.exists():
        np.save(array, store.features(store.rows))
    for path in (array, store.path):
        cold(path)  # how a file lies in the page cache depends on what put it there: see `growth`
    times = in_turn(
        {
            "np.load": lambda: np.load(array),
            "with checksums": lambda: resident(store, store.rows),
            "without checksums": lambda: resident(store, store.rows, check=False),
        },
        rounds,
    )
    size = len(store) * store.schema.row_bytes / 1e9
    limits = {"with_checksums": ">= 0.6", "without_checksums": ">= 0.8"}
    bench.add("bulk load", times, "np.load", "GB/s", size, **limits)


def batches(bench: Bench, store: Store, rounds: int) -> None:
    held = resident(store, store.rows)
    flat = held.view(-1, DIM)
    samples = len(store)
    # What loaders draw, as numbers that lie ready, for several epochs.
    sampler = SegmentSampler(1, STORED, FRAMES)
    ready = []
    for number in range(4):
        order = np.random.default_rng(number).permutation(samples) * STORED
        places = sampler.draw((1, 2, number), 0, samples, order)
        ready.append(torch.from_numpy(places.reshape(-1)).split(BATCH * FRAMES))
    epochs = itertools.cycle(ready)
    options = {"batch_size": BATCH, "frames": FRAMES, "seed": 0}
    kinds = {
        "resident": held,
        "memory-mapped": MappedFeatures(open_store(store.path), store.rows),
        "streamed": StreamedFeatures(store, store.rows),
    }
    loaders = {kind: FeatureLoader(held, store.labels, **options) for kind, held in kinds.items()}
    epoch = iter(range(10**6))

    def bare() -> None:
        # Held until the next one is there, as in every loop that uses its batch: two pieces of
        # memory take turns then, where one thrown away at once would stay in the cache.
        for index in next(epochs):
            _held = flat.index_select(0, index)

    def run(kind: str) -> None:
        for _ in loaders[kind].epoch(next(epoch)):
            pass

    def fresh(kind: type[MappedFeatures] | type[StreamedFeatures]) -> None:
        """An epoch of a store just opened, its files not in memory: all is checked."""
        opened = open_store(store.path)
        for _ in FeatureLoader(kind(opened, opened.rows), opened.labels, **options).epoch(0):
            pass

    shards = sorted(store.path.glob("features/c/*/0/0/0"))
    whole = np.empty(max(shard.stat().st_size for shard in shards), np.uint8)

    def read_and_gather() -> None:
        """What streaming cannot do without: each file read, proved, and gathered from once."""
        indices = next(epochs)
        for number, shard in enumerate(shards):
            with open(shard, "rb", buffering=0) as file:
                size = file.readinto(whole)
            crc32c(whole[:size])
            pool = torch.from_numpy(whole[: TAR_ROWS * STORED * DIM * 2].view(np.float16))
            for index in indices[number :: len(shards)]:
                _held = pool.view(-1, DIM).index_select(0, index % (TAR_ROWS * STORED))

    work = {"index_select": bare, "read, crc32c and index_select": read_and_gather}
    times = in_turn({**work, **{k: lambda k=k: run(k) for k in kinds}}, rounds)
    bench.add(
        f"batches of {BATCH}, {FRAMES} of {STORED} frames",
        *(times, "index_select", "samples/s", samples),
        resident=">= 0.9",
        memory_mapped=">= 0.35",
    )
    bound = "read, crc32c and index_select"
    bench.rows.append(
        common.Row(
            f"streaming, files in the page cache, against {bound} of each file",
            f"{samples / seconds(times, 'streamed'):.4g} samples/s",
            f"{samples / seconds(times, bound):.4g} samples/s",
            ratio(times, "streamed", bound),
            ">= 0.5",
        )
    )
    loaders.clear()  # what is mapped stays in memory
    kinds.clear()
    gc.collect()
    cold_times: Times = {"memory-mapped, cold": [], "streamed, cold": []}
    for _ in range(rounds):
        for name, kind in zip(cold_times, (MappedFeatures, StreamedFeatures), strict=True):
            cold(store.path)
            measured = in_turn_once(lambda kind=kind: fresh(kind))
            cold_times[name].append(measured)
    bench.add(
        "cold", cold_times, "memory-mapped, cold", "samples/s", samples, streamed_cold=">= 0.5"
    )


def in_turn_once(work: Callable[[], None]) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def verification(bench: Bench, store: Store, rounds: int) -> None:
    shards = sorted(store.path.glob("features/c/*/0/0/0"))
    buffer = np.empty(2**20, np.uint8)

    def raw() -> None:
        for shard in shards:
            with open(shard, "rb", buffering=0) as file:
                while read := file.readinto(buffer):
                    crc32c(buffer[:read])

    times = in_turn(
        {"read and crc32c": raw, "verify --deep": lambda: verify(store.path, deep=True)}, rounds
    )
    size = len(store) * store.schema.row_bytes / 1e9
    bench.add("verify", times, "read and crc32c", "GB/s", size, verify___deep=">= 0.5")


MEMORY = """
import json, resource, sys, time
started = time.perf_counter()
from featstore import open_store
open_store(sys.argv[1])  # loads the modules that opening needs
imported = time.perf_counter()
store = open_store(sys.argv[1])
opened = time.perf_counter()
from pathlib import Path
shards = sorted(Path(sys.argv[1]).glob("features/c/*/0/0/0"))
looked = time.perf_counter()
for shard in shards:
    shard.stat()
for file in Path(sys.argv[1]).glob("**/zarr.json"):
    file.read_bytes()
touched = time.perf_counter()
labels = store.labels, store.keys
listed = time.perf_counter()
import torch
from featstore.batches.loader import FeatureLoader, StreamedFeatures, resident
torch.set_num_threads(1)
held = open_store(sys.argv[1])
kind = sys.argv[2]
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
before = peak()
if kind != "open":
    rows = store.rows
    features = StreamedFeatures(store, rows) if kind == "streamed" else resident(store, rows)
    loader = FeatureLoader(features, store.labels, batch_size=256, frames=8, seed=0)
    steps = 0
    for batch in loader.epoch(0):
        steps += 1
print(json.dumps({"open_s": opened - imported, "list_s": listed - touched,
                  "bare_s": touched - looked, "before": before,
                  "peak": peak(), "bytes": len(store) * store.schema.row_bytes}))
"""


def apart(store: Path, kind: str) -> dict[str, float]:
    """Measure in a process of its own; bytes and seconds."""
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, str(store), kind], capture_output=True, text=True, check=True
    )
    measured: dict[str, float] = json.loads(ran.stdout)
    return measured


def opening(bench: Bench, small: Store, kinetics: Store, rounds: int) -> None:
    opened = [apart(kinetics.path, "open") for _ in range(rounds)]
    seconds_open = common.middle([one["open_s"] for one in opened])
    listed = common.middle([one["list_s"] for one in opened])
    bare = common.middle([one["bare_s"] for one in opened])
    held = apart(small.path, "resident")
    streamed = apart(kinetics.path, "streamed")
    grown = (held["peak"] - held["before"]) / held["bytes"]
    size = f"{len(kinetics)} rows x {STORED} x {DIM}"
    print()
    common.table(
        ["opening and memory", "measured"],
        [
            [f"open, {size}, {kinetics.schema.tars} tars", f"{seconds_open:.3f} s"],
            ["its labels and keys", f"{listed:.3f} s"],
            ["resident loader, memory over bytes", f"{grown:.3f}"],
            ["streaming loader, whole process", f"{streamed['peak'] / 1e6:.0f} MB"],
            [
                "streaming loader, beyond the imports",
                f"{(streamed['peak'] - streamed['before']) / 1e6:.0f} MB",
            ],
        ],
    )
    bench.details["opening"] = {"opened": opened, "resident": held, "streamed": streamed}
    bench.rows += [
        common.Row(
            f"open a store of {size}, against looking at its files once",
            f"{seconds_open:.3f} s",
            f"{bare:.3f} s",
            seconds_open / bare,
            "<= 2",
        ),
        common.Row(
            "memory of the resident loader, one epoch, against the bytes of the features",
            f"{(held['peak'] - held['before']) / 1e6:.0f} MB",
            f"{held['bytes'] / 1e6:.0f} MB",
            grown,
            "< 1.3",
        ),
        common.Row(
            f"memory of streaming an epoch of {streamed['bytes'] / 1e9:.1f} GB beyond the imports, "
            "against its two pools",
            f"{(streamed['peak'] - streamed['before']) / 1e6:.0f} MB",
            f"{POOL_BYTES / 1e6:.0f} MB",
            (streamed["peak"] - streamed["before"]) / POOL_BYTES,
            "<= 2",
        ),
    ]


def growth(bench: Bench, tars: int, rounds: int) -> None:
    sizes = [tars, 4 * tars, 16 * tars]
    stores = {
        n: make(common.WORK / "store" / f"growth-{n}.zarr", n, 8, distinct=tars) for n in sizes
    }
    for store in stores.values():
        # Files that were written piece by piece lie in smaller pieces in the page cache than copies
        # of them, and are read a third slower; read back from the disk they are alike.
        cold(store.path)

    def epoch(store: Store, kind: type[MappedFeatures] | type[StreamedFeatures]) -> None:
        loader = FeatureLoader(
            kind(store, store.rows), store.labels, batch_size=BATCH, frames=FRAMES, seed=0
        )
        for _ in loader.epoch(0):
            pass

    work: dict[str, Callable[[Store], Any]] = {
        "verify --deep": lambda store: verify(store.path, deep=True),
        "bulk load": lambda store: resident(store, store.rows),
        "mapped epoch": lambda store: epoch(store, MappedFeatures),
        "streamed epoch": lambda store: epoch(store, StreamedFeatures),
    }
    shown, details = [], {}
    for name, run in work.items():
        # The least of several: what is added by other programs has no exponent. Small sizes, whose
        # times a moment can change, have more of them. Opening, measured above, is not in it.
        times: dict[int, list[float]] = {n: [] for n in sizes}
        for _ in range(rounds + 1):
            for n, repeats in zip(sizes, (4, 2, 1), strict=True):
                for _ in range(repeats):
                    opened = open_store(stores[n].path)
                    times[n].append(in_turn_once(lambda run=run, opened=opened: run(opened))[0])
        spent = [min(times[n]) for n in sizes]
        exponent = float(np.polyfit(np.log(sizes), np.log(spent), 1)[0])
        shown.append([name, *spent, exponent])
        details[name] = {"tars": sizes, "cpu_seconds": spent, "exponent": exponent}
        bench.rows.append(
            common.Row(
                f"growth of {name}: {sizes[0] * TAR_ROWS} to {sizes[-1] * TAR_ROWS} rows",
                f"{spent[-1]:.3g} s CPU",
                f"{spent[0]:.3g} s CPU",
                exponent,
                "exponent 1.0 +- 0.05",
            )
        )
    print()
    common.table(["growth, CPU s", *(f"{n * TAR_ROWS} rows" for n in sizes), "exponent"], shown)
    bench.details["growth"] = details


def main() -> None:
    """Measure all parts."""
    chosen = common.options(__doc__, tars=16, repetitions=7, part="")
    if chosen.quick:
        chosen.tars, chosen.repetitions = 4, 2
    torch.set_num_threads(1)
    where = common.machine()
    folder = common.WORK / "store"
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{where['name']}, load {where['load_average_before']}")
    store = make(folder / f"random-{chosen.tars}.zarr", chosen.tars, STORED, distinct=chosen.tars)
    bench = Bench()
    parts: dict[str, Callable[[], None]] = {
        "load": lambda: loading(bench, store, chosen.repetitions),
        "batches": lambda: batches(bench, store, chosen.repetitions),
        "verify": lambda: verification(bench, store, chosen.repetitions),
        "open": lambda: opening(
            bench,
            store,
            make(folder / "kinetics.zarr", KINETICS_TARS, STORED, distinct=0),
            chosen.repetitions,
        ),
        "growth": lambda: growth(bench, chosen.tars, math.ceil(chosen.repetitions / 2)),
    }
    for name, run in parts.items():
        if chosen.part in ("", name):
            run()
    common.save("store", where, bench.rows, bench.details)


if __name__ == "__main__":
    main()
