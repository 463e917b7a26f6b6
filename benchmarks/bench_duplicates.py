"""How much is found of copies and swapped labels that were planted, how precisely, how fast?

A store of `--rows` videos of the generated world, 40 classes. `--files` of them are real files,
packed and decoded, with copies of every kind among them; the others have embeddings only. The
commands run as processes of their own; their time and their peak memory are measured, and the
memory again on a store of half the rows.
"""

from __future__ import annotations

import csv
import json
import resource
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import numpy as np
import torch
from bench_recipe import AT_ONCE, small_clip

from featstore.format.metadata import TarEntry
from pipeline.demo.small_clip import PREPROCESSING
from pipeline.demo.world import FRAMES, draw_world, render_clip
from pipeline.tars.dataset import load_dataset
from pipeline.tars.identical import content_hashes
from pipeline.tars.packing import pack
from pipeline.tars.reading import open_packed
from tests.support.worlds.copied_videos import KINDS, decoded, encode_clip, make_copy, world_frames

COPIES = 50  # of each kind
SWAPPED = 0.02
NEAR = tuple(kind for kind in KINDS if kind != "identical")


def encoded(model: Any, clips: list[Any], frames: int) -> Any:
    """Embeddings of videos, float16 [n,1,frames,D]."""
    mean, std = (torch.tensor(PREPROCESSING[key])[:, None, None] for key in ("mean", "std"))
    found = []
    for start in range(0, len(clips), AT_ONCE):
        chosen = [
            c[(np.arange(frames) * len(c) / frames).astype(int)] for c in clips[start:][:AT_ONCE]
        ]
        pixels = torch.from_numpy(np.concatenate(chosen)).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            found.append(model.encode_image((pixels - mean) / std).view(len(chosen), 1, frames, -1))
    return torch.cat(found).half().numpy()


def files(folder: Path, count: int) -> tuple[Path, dict[str, list[tuple[str, str]]]]:
    """Write `count` videos, copies among them, and pack them; return the workspace, the pairs."""
    classes, rng = draw_world(5).known, np.random.default_rng(0)
    copies = min(COPIES, count // (3 * len(KINDS)))
    originals, made = count - copies * len(KINDS), dict[str, list[tuple[str, str]]]()
    paths = []
    for number in range(originals):
        sprite = classes[number % len(classes)]
        paths.append(folder / f"videos/{sprite.folder}/{number:05d}.mp4")
        encode_clip(world_frames(sprite, number), paths[-1])
    order = iter(rng.permutation(originals).tolist())
    for kind in KINDS:
        for _ in range(copies):
            source = paths[next(order)]
            copy = make_copy(kind, source, source.with_name(f"{kind}-{source.stem}"))
            made.setdefault(kind, []).append((source.stem, copy.stem))
    root = folder / "root"
    pack(folder / "videos", "world", root / "datasets/world")
    return root, made


def planted_store(root: Path, rows: int, dim: int, frames: int, name: str) -> tuple[Path, Any]:
    """A store of the packed videos and of others without files; returns it and its true labels."""
    model, drawn = small_clip(dim), draw_world(5)
    dataset = load_dataset(root / "datasets/world")
    keys, clips, labels = [], [], []
    entries = []
    for tar in dataset.tars:
        with open_packed(dataset, tar) as archive:
            for sample in archive.samples:
                keys.append(sample.key)
                labels.append(sample.sidecar["label"])
                clips.append(sample)
        entries.append(TarEntry(tar.file, tar.samples, tar.bytes, tar.sha256))
    by_key = {path.stem: path for path in (root.parent / "videos").glob("*/*")}
    parts = [encoded(model, [decoded(by_key[_stem(key)]) for key in keys], frames)]
    moments = np.linspace(0.0, 1.0, FRAMES)
    names = list(dataset.class_names)
    while len(labels) < rows:
        block = range(len(labels), min(rows, len(labels) + 500))
        chosen = [drawn.known[number % len(drawn.known)] for number in block]
        made = [
            render_clip(sprite, np.random.default_rng([5, 2, number]), moments)
            for sprite, number in zip(chosen, block, strict=True)
        ]
        parts.append(encoded(model, made, frames))
        labels += [names.index(sprite.name) for sprite in chosen]
        keys += [f"video-{number}" for number in block]
        entries.append(TarEntry(f"{len(labels)}.tar", len(block), 1, f"{len(labels):064x}"))
    features, truth = np.concatenate(parts), np.array(labels, np.int32)
    rng = np.random.default_rng(1)
    swapped = rng.choice(rows, round(SWAPPED * rows), replace=False)
    given = truth.copy()
    given[swapped] = (truth[swapped] + rng.integers(1, len(names), len(swapped))) % len(names)
    path = root / f"features/world/{name}.zarr"
    write_store(path, features, given, keys, entries, names, dataset)
    return path, [keys[at] for at in swapped]


def _stem(key: str) -> str:
    return key.rpartition("%2F")[2].partition("%2E")[0]


def write_store(
    path: Path, features: Any, labels: Any, keys: Any, entries: Any, names: Any, dataset: Any
) -> None:
    """Write rows as partitions of the tars `entries`."""
    sizes = [entry.rows for entry in entries]
    text = np.zeros((len(names), features.shape[-1]), np.float32)
    text[:, 0] = 1
    starts = np.cumsum([0, *sizes])
    pieces = [(features[a:b], labels[a:b], np.ones(b - a, np.uint32)) for a, b in pairwise(starts)]
    common.feature_store(
        path, pieces, sizes, features.shape[1:], names, text, ("train",),
        keys=keys, tars=entries, dataset=dataset.name, fingerprint=dataset.fingerprint,
    )  # fmt: skip


def timed(root: Path, *words: str) -> tuple[Any, float, float]:
    """Run `mote-cli store ...`; return its JSON, seconds, and peak memory in MB."""
    command = [sys.executable, "-m", "cli.main", "store", *words, "--root", str(root), "--json"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(done.stderr)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return json.loads(done.stdout), seconds, peak


def main() -> None:
    """Plant, search, and compare what is found with what was planted."""
    chosen = common.options(__doc__, rows=10_000, files=1000, dims="64", frames=8)
    if chosen.quick:
        chosen.rows, chosen.files = 1200, 300
    where, rows, details = common.machine(), [], []
    folder = common.fresh(common.WORK / "duplicates")
    root, planted = files(folder, chosen.files)
    hashes = content_hashes(root / "datasets/world")
    for dim in map(int, chosen.dims.split(",")):
        # The peak of all processes so far counts, so the small store comes first.
        half, _ = planted_store(
            root, max(chosen.rows // 2, chosen.files), dim, chosen.frames, f"half-{dim}"
        )
        _, _, peak_half = timed(root, "duplicates", str(half), "--no-picture")
        path, swapped = planted_store(root, chosen.rows, dim, chosen.frames, f"all-{dim}")
        found, seconds, peak = timed(root, "duplicates", str(path), "--no-picture")
        by_stem = {_stem(key): key for key in hashes}
        true = {
            kind: {frozenset(by_stem[s] for s in pair) for pair in pairs}
            for kind, pairs in planted.items()
        }
        said = {
            frozenset((pair["first"], pair["second"]))
            for g in found["found"]
            for pair in g["pairs"]
        }
        every = frozenset().union(*true.values())
        share = {kind: 100 * len(said & pairs) / len(pairs) for kind, pairs in true.items()}
        near = frozenset().union(*(true[kind] for kind in NEAR))
        recall = 100 * len(said & near) / len(near)
        precision = 100 * len(said & every) / max(len(said), 1)
        listed, took, peak_suspects = timed(root, "suspects", str(path), "--no-picture")
        with open(listed["files"]["list"], newline="") as file:
            order = [row["key"] for row in csv.DictReader(file)]
        first = set(order[: round(0.06 * len(order))])
        swaps = 100 * len(first & set(swapped)) / len(swapped)
        common.table(["kind", "found %"], [[kind, value] for kind, value in share.items()])
        rows += [
            row(f"identical copies found, {dim} wide", share["identical"], "%", 100),
            row(f"near duplicates found, {dim} wide", recall, "%", 98),
            row(f"precision, {dim} wide", precision, "%", 98),
            row(f"swapped labels in the first 6 %, {dim} wide", swaps, "%", 90),
            row(f"`store duplicates`, {chosen.rows} rows, {dim} wide", seconds, "s", 60),
            row(f"`store suspects`, {chosen.rows} rows, {dim} wide", took, "s", 60),
            common.Row(
                f"peak memory, {dim} wide",
                f"{peak:.0f} MB",
                f"{peak_half:.0f} MB with half the rows",
                peak / peak_half,
                "flat",
            ),
        ]
        details.append(
            {
                "dim": dim,
                "share": share,
                "found": len(said),
                "limits": found["limits"],
                "peaks": [peak_half, peak, peak_suspects],
            }
        )
        print([r.markdown(where) for r in rows[-7:]], flush=True)
    common.save("duplicates", where, rows, {"options": vars(chosen), "sets": details})


def row(claim: str, value: float, unit: str, limit: float) -> common.Row:
    """A measured number beside its limit."""
    return common.Row(
        claim, f"{value:.1f} {unit}", f"{limit} {unit}", value / limit, f"{limit} {unit}"
    )


if __name__ == "__main__":
    main()
