"""What the benchmarks share: clips, encoders, the machine's description, results as files and rows.

Work files (clips, encoders, packed sets) lie under benchmarks/results/work and are made once; git
ignores the folder, so it may be deleted at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

# As the command line sets it: threads that spin while they wait count as work that nobody does.
# It is read when torch is loaded, so a benchmark imports this file before it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

RESULTS = Path(__file__).parent / "results"
WORK = RESULTS / "work"
PACKAGES = ("mote-video", "torch", "torchvision", "open_clip_torch", "av", "zarr", "numpy")

TAR_ROWS = 256  # samples of a tar

WIDTH, HEIGHT, SECONDS = 340, 256, 10  # the size Kinetics copies are usually kept at
RECIPE = 1  # change it with the recipe of the clips, so that old ones are not taken for new ones
# Grey levels of noise: with it a clip takes about the bytes (0.6 MB) and the decoding time of a
# real Kinetics clip of this size.
NOISE = 5.5


@dataclass(frozen=True)
class Row:
    """One line of the table in docs/benchmarks.md."""

    claim: str
    measured: str
    baseline: str
    ratio: float
    limit: str

    def markdown(self, where: dict[str, Any]) -> str:
        """The line, with date and machine as its first cells."""
        cells = (
            where["date"][:10],
            where["name"],
            self.claim,
            self.measured,
            self.baseline,
            f"{self.ratio:.3f}",
            self.limit,
        )
        return f"| {' | '.join(cells)} |"


def options(description: str | None, **extra: Any) -> argparse.Namespace:
    """Parse the command line; `extra` maps an option's name to its default value."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small sizes, one repetition")
    for name, default in extra.items():
        kind = int if default is None else type(default)
        parser.add_argument(f"--{name}", type=kind, default=default)
    return parser.parse_args()


def machine() -> dict[str, Any]:
    """Date, processor, cores, memory, load and versions, as every result holds them."""
    processor = platform.processor() or "unknown processor"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "name": f"{cores} cores of {processor}, {memory:.0f} GiB",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average_before": round(os.getloadavg()[0], 2),
        "threads_environment": os.environ.get("OMP_NUM_THREADS", ""),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def save(name: str, where: dict[str, Any], rows: Sequence[Row], details: dict[str, Any]) -> None:
    """Write benchmarks/results/NAME.json and print the rows for docs/benchmarks.md."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{name}.json"
    result = {"machine": where, "rows": [vars(row) for row in rows], **details}
    file.write_text(json.dumps(result, indent=1) + "\n")
    print("\nfor docs/benchmarks.md:")
    for row in rows:
        print(row.markdown(where))
    print(f"kept as {file.relative_to(Path(__file__).parent.parent)}")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a plain table, numbers with three digits after the point at most."""
    cells = [[f"{c:.3f}" if isinstance(c, float) else str(c) for c in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    for line in (list(header), *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    sys.stdout.flush()


def own_process(kind: str, *sizes: int) -> dict[str, float]:
    """What the running script prints for `--of kind sizes...`, in a process of its own."""
    words = [sys.executable, sys.argv[0], "--of", kind, *(str(int(size)) for size in sizes)]
    found = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(found.splitlines()[-1])
    return result


Asked = tuple[str, str, str, str, str, str]
"""A claim; the kind measured and the kind of its baseline; what of a run; its unit; the limit."""


def compare_kinds(
    name: str,
    where: dict[str, Any],
    whole: str,
    runs: Sequence[dict[str, Any]],
    asked: Sequence[Asked],
) -> None:
    """Print and keep the ratios of kinds that were measured in turns, in the middle of all runs.

    `whole` is the claim of a row, with {} for the short one that the table shows.
    """

    def value(kind: str, what: str) -> float:
        return middle([run[kind][what] for run in runs])

    found = [
        (claim, value(a, what), value(b, what), unit, limit,
         middle([run[a][what] / max(run[b][what], 1e-9) for run in runs]))
        for claim, a, b, what, unit, limit in asked
    ]  # fmt: skip
    rows = [
        Row(whole.format(claim), f"{of_a:.2f} {unit}", f"{of_b:.2f} {unit}", ratio, limit)
        for claim, of_a, of_b, unit, limit, ratio in found
    ]
    print(where["name"])
    table(
        ["measure", "value", "baseline", "ratio", "limit"],
        [[claim, a, b, ratio, limit] for claim, a, b, _, limit, ratio in found],
    )
    save(name, where, rows, {"runs": list(runs)})


def middle(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def fresh(folder: Path) -> Path:
    """`folder`, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def random_store(
    name: str,
    tars: int,
    *,
    classes: int,
    dim: int,
    frames: int,
    views: int = 1,
    split: str = "train",
) -> Any:
    """A store of `tars` x 256 rows of random features; labels, class texts and one split too.

    Features lie near their class's text, so that accuracies are neither none nor all.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    text = rng.normal(size=(classes, dim)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)

    def rows() -> Any:
        labels = rng.integers(0, classes, TAR_ROWS).astype(np.int32)
        features = rng.normal(size=(TAR_ROWS, views, frames, dim)) + 4 * text[labels][:, None, None]
        return features, labels, np.ones(TAR_ROWS, np.uint32)

    names = tuple(f"class {i}" for i in range(classes))
    path = fresh(WORK / name) / "random.zarr"
    parts = (rows() for _ in range(tars))
    return feature_store(
        path, parts, [TAR_ROWS] * tars, (views, frames, dim), names, text, (split,)
    )


def feature_store(
    path: Path,
    parts: Iterable[tuple[Any, Any, Any]],
    rows: Sequence[int],
    shape: tuple[int, int, int],
    names: Sequence[str],
    text: Any,
    splits: Sequence[str],
    logit_scale: float = 100.0,
    *,
    keys: Sequence[str] | None = None,
    tars: Sequence[Any] | None = None,
    dataset: str = "",
    fingerprint: str = "",
) -> Any:
    """A store at `path`; each part, of as many videos as `rows` says, is a partition.

    A part holds features [n,V,F,D], labels [n] and bits of splits [n]; `shape` is (V, F, D).
    `text` [C,D] belongs to the classes `names`. `keys`, `tars` (their entries), `dataset` and its
    `fingerprint` are those of packed videos, for rows that have files.
    """
    import numpy as np

    from featstore import ClassText, Partition, Provenance, StoreSchema, StoreWriter, open_store
    from featstore.format.metadata import StoreMetadata, TarEntry

    views, frames, dim = shape
    sampling = f"uniform:{frames}" if views == 1 else f"clips:{frames}x{views}"
    writer = StoreWriter.init(
        path,
        StoreMetadata(
            StoreSchema.create(len(rows), max(rows), views, frames, dim),
            Provenance(
                *("random", "0" * 64, dim, logit_scale, "fp32", sampling, 1, {}, "none"),
                dataset=dataset,
                dataset_fingerprint=fingerprint,
            ),
            tuple(tars or (TarEntry(f"{i:06d}.tar", n, 1, "0" * 64) for i, n in enumerate(rows))),
            *(tuple(names), tuple(names), tuple(splits)),
        ),
        {"name": ClassText(tuple(names), text, "0" * 64)},
    )
    with writer.claim():
        done = 0
        for tar, (features, labels, bits) in enumerate(parts):
            n = len(labels)
            named = [f"{tar}-{i}" for i in range(n)] if keys is None else keys[done : done + n]
            done += n
            index = np.broadcast_to(np.arange(frames, dtype=np.int32), (n, views, frames))
            writer.write_partition(
                tar,
                Partition(
                    key=list(named),
                    label=labels,
                    num_frames=np.full(n, frames, np.int32),
                    fps=np.full(n, 25, np.float32),
                    status=np.ones(n, np.uint8),
                    splits=bits,
                    container_frames=np.full(n, frames, np.int32),
                    damaged_packets=np.zeros(n, np.int32),
                    reason=[""] * n,
                    frame_index=index.copy(),
                    pts=index.astype(np.float64) / 25,
                    features=features.astype(np.float16),
                ),
            )
    return open_store(path)


def class_folders(target: Path, clips: Sequence[Path], videos: int, classes: int) -> Path:
    """`videos` files in class folders, the given clips again and again under other names."""
    fresh(target)
    for number in range(videos):
        folder = target / f"class_{number % classes}"
        folder.mkdir(exist_ok=True)
        shutil.copyfile(clips[number % len(clips)], folder / f"clip_{number:05d}.mp4")
    return target


def small_clips(count: int) -> list[Path]:
    """Clips of 96x64 and 24 frames that cost little, so that thousands are quick."""
    import av
    import numpy as np

    folder = WORK / "small"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:02d}.mp4" for number in range(count)]
    for number, path in enumerate(paths):
        if path.is_file():
            continue
        rng = np.random.default_rng(number)
        partial = path.with_suffix(".partial")
        with av.open(str(partial), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=24)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            stream.codec_context.thread_count = 1
            for _ in range(24):
                picture = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
        partial.rename(path)
    return paths


def kinetics_clips(count: int) -> list[Path]:
    """`count` distinct clips: 340x256, 10 s, 25 to 30 fps, H.264 with x264's default settings.

    A camera moves over a textured background, textured things move before it, every third clip
    has a cut, and there is a little noise, so that decoding costs about what real clips cost.
    """
    folder = WORK / f"kinetics-{RECIPE}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03d}.mp4" for number in range(count)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_make_kinetics_clip, [p for p in paths if not p.is_file()]))
    return paths


def _make_kinetics_clip(path: Path) -> None:
    import av
    import numpy as np

    number = int(path.stem)
    rng = np.random.default_rng([RECIPE, number])
    fps = (25, 30, 30)[number % 3]
    frames = fps * SECONDS
    cuts = [0, int(rng.integers(frames // 4, frames * 3 // 4))] if number % 3 == 2 else [0]
    partial = path.with_suffix(".partial")
    with av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.thread_count = 1
        for t in range(frames):
            if t in cuts:
                scene = _Scene(rng)
            picture = av.VideoFrame.from_ndarray(scene.draw(t / fps, rng), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    partial.rename(path)


class _Scene:
    """A background, a camera path over it, and things that move; `rng` draws all of it."""

    def __init__(self, rng: Any) -> None:
        self.background = _texture(rng, 2 * HEIGHT, 2 * WIDTH)
        self.things = [
            (_texture(rng, side, side), rng.uniform(0, 6.3, 4), rng.uniform(0.3, 1.2, 2))
            for side in rng.integers(40, 120, 3)
        ]
        self.phase = rng.uniform(0, 6.3, 2)
        self.speed = rng.uniform(0.1, 0.4, 2)
        self.shake = rng.uniform(0.0, 1.5)

    def draw(self, t: float, rng: Any) -> Any:
        """The picture at `t` seconds, uint8 [HEIGHT, WIDTH, 3]."""
        import numpy as np

        reach = np.array([HEIGHT, WIDTH]) / 2 - 4
        centre = reach * (1 + np.sin(self.speed * t + self.phase))
        picture = _window(self.background, centre + rng.normal(0, self.shake, 2), HEIGHT, WIDTH)
        for texture, phase, speed in self.things:
            side = len(texture)
            where = (np.sin(speed * t * 2 + phase[:2]) + 1) / 2 * [HEIGHT - side, WIDTH - side]
            y, x = where.astype(int)
            yy, xx = np.mgrid[:side, :side] / (side / 2) - 1
            inside = (yy**2 + xx**2 < 1)[..., None]
            patch = picture[y : y + side, x : x + side]
            patch[:] = np.where(inside, texture, patch)
        picture += rng.normal(0, NOISE, (HEIGHT, WIDTH, 1))
        return np.clip(picture, 0, 255).astype(np.uint8)


def _texture(rng: Any, height: int, width: int) -> Any:
    """Colour noise of all sizes, float32 [height, width, 3] around 128."""
    import numpy as np
    import torch

    total = np.full((height, width, 3), 128.0, np.float32)
    for cells, strength in ((3, 45.0), (9, 30.0), (27, 18.0), (81, 10.0), (200, 6.0)):
        noise = torch.from_numpy(rng.normal(0, strength, (1, 3, cells, cells)).astype(np.float32))
        smooth = torch.nn.functional.interpolate(
            noise, (height, width), mode="bilinear", align_corners=False
        )
        total += smooth[0].permute(1, 2, 0).numpy()
    return total


def _window(image: Any, corner: Any, height: int, width: int) -> Any:
    """A window at a corner between pixels, by bilinear weights."""
    import numpy as np

    top, left = np.clip(corner, 0, np.array(image.shape[:2]) - [height + 1, width + 1])
    y, x = int(top), int(left)
    b, a = np.float32(top - y), np.float32(left - x)
    part = image[y : y + height + 1, x : x + width + 1]
    rows = part[:-1] * (1 - b) + part[1:] * b
    return rows[:, :-1] * (1 - a) + rows[:, 1:] * a


def vit_b16_folder() -> Path:
    """A ViT-B/16 with random weights in open_clip's folder format: what OpenAI's weights cost."""
    return _random_clip("ViT-B-16-quickgelu", None)


def vit_b32_folder() -> Path:
    """A ViT-B/32 with random weights in open_clip's folder format."""
    return _random_clip("ViT-B-32-quickgelu", None)


def tiny_clip_folder() -> Path:
    """A CLIP that costs nearly nothing, with random weights, for measurements of the rest."""
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
    return _random_clip("tiny-clip", {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text})


def _random_clip(name: str, config: dict[str, Any] | None) -> Path:
    import open_clip
    import torch

    from pipeline.encoders.sources import save_open_clip_folder

    folder = WORK / "encoders" / name
    if not (folder / "open_clip_config.json").is_file():
        config = config or open_clip.get_model_config(name)
        torch.manual_seed(0)
        tower = {"quick_gelu": False, **config}
        model = open_clip.CLIP(**tower)
        save_open_clip_folder(model, config, {}, folder)
    return folder
