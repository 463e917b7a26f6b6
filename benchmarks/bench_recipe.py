"""How near does `train-head` come, without options, to the best of a search over its options?

For every size, videos of a generated world (its classes differ mostly by motion) are encoded by a
small CLIP of the width asked for; no video files are made. The same videos are trained on by the
default recipe, by the recipe of the paper, and by a number of runs with options drawn at random;
all are tested close-set on videos that no training saw, and zero-shot on other classes. The best of
the search is chosen on the test videos, which flatters it: a user could not.
"""

from __future__ import annotations

import copy
import math
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import numpy as np
import open_clip
import torch
from torch.nn import functional

from featstore import Store, open_store
from heads import load_head, train_head
from heads.methods.head import Head
from heads.methods.settings import MethodConfig
from heads.recipes import load_recipe
from heads.scoring.scores import can_modulate, percent, view_cosines
from heads.training.config import TrainConfig
from heads.training.validation import Validation, choose_validation, judged_features
from pipeline.demo.small_clip import MODEL_CONFIG, PREPROCESSING, TOKEN_IDS
from pipeline.demo.world import ALL_CLASSES, FRAMES, SpriteClass, draw_world, render_clip

CLASSES = {5: 5, 20: 10, 100: 20}
"""Classes of a set of so many videos; 40 for all others."""
TEST, NEW = 30, 10  # videos of a class
AT_ONCE = 64  # videos encoded together
EPOCHS = 24  # of a run of the search, or fewer


def small_clip(dim: int) -> Any:
    """A CLIP of the demo's kind with embeddings of width `dim`; trained once, then kept."""
    from tests.support.worlds.demo_clip import train_small_clip

    file = common.WORK / f"world-clip-{dim}.pt"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(train_small_clip(images=12_000, epochs=8, dim=dim)[0], file)
    state = torch.load(file, weights_only=True)
    config = copy.deepcopy(MODEL_CONFIG) | {"embed_dim": dim}
    ids = state.pop(TOKEN_IDS)
    config["text_cfg"]["vocab_size"] = len(ids)
    model = open_clip.CLIP(**config, quick_gelu=False)
    model.load_state_dict({name: value.float() for name, value in state.items()})
    model.eval().token_ids = ids
    return model


@torch.no_grad()
def encoded(model: Any, seed: int, sprite: SpriteClass, first: int, count: int) -> Any:
    """Frame features of `count` videos of a class, float16 [count, 1, FRAMES, D]."""
    moments = np.linspace(0.0, 1.0, FRAMES)
    number = ALL_CLASSES.index(sprite)
    mean, std = (torch.tensor(PREPROCESSING[key])[:, None, None] for key in ("mean", "std"))
    found = []
    for start in range(0, count, AT_ONCE):
        clips = [
            render_clip(sprite, np.random.default_rng([seed, 1, number, first + i]), moments)
            for i in range(start, min(start + AT_ONCE, count))
        ]
        pixels = torch.from_numpy(np.concatenate(clips)).permute(0, 3, 1, 2).float() / 255
        found.append(model.encode_image((pixels - mean) / std).view(len(clips), 1, FRAMES, -1))
    return torch.cat(found).half().numpy()


def world_store(videos: int, dim: int, seed: int, val: int) -> tuple[Store, Store]:
    """Stores of known classes (splits train, val with `val` videos a class, test) and new ones."""
    folder = common.fresh(common.WORK / f"world-{seed}-{videos}-{dim}-{val}")
    model, drawn = small_clip(dim), draw_world(seed)
    order = np.random.default_rng([seed, videos]).permutation(len(drawn.known))
    known = tuple(drawn.known[at] for at in sorted(order[: CLASSES.get(videos, 40)]))
    tokenise = open_clip.SimpleTokenizer(context_length=MODEL_CONFIG["text_cfg"]["context_length"])

    def store(name: str, classes: tuple[SpriteClass, ...], counts: list[list[int]]) -> Store:
        names = [sprite.name for sprite in classes]
        with torch.no_grad():
            tokens = torch.searchsorted(model.token_ids, tokenise(names))
            text = functional.normalize(model.encode_text(tokens), dim=-1).numpy()

        def parts() -> Any:
            for label, sprite in enumerate(classes):
                pieces = [
                    encoded(model, seed, sprite, 100_000 * split, count)
                    for split, count in enumerate(counts[label])
                    if count
                ]
                bits = np.repeat([1, 2, 4], counts[label]).astype(np.uint32)
                yield np.concatenate(pieces), np.full(len(bits), label, np.int32), bits

        rows = [sum(of) for of in counts]
        path, splits = folder / f"{name}.zarr", ("train", "val", "test")
        scale = float(model.logit_scale.detach().exp())
        made = common.feature_store(
            path, parts(), rows, (1, FRAMES, dim), names, text, splits, scale
        )
        return open_store(made.path)

    share = [videos // len(known) + (i < videos % len(known)) for i in range(len(known))]
    return (
        store("known", known, [[n, val, TEST] for n in share]),
        store("new", drawn.new, [[0, 0, NEW]] * len(drawn.new)),
    )


@dataclass
class Trial:
    """One set of videos, on which heads are trained and tested."""

    known: Store
    new: Store
    folder: Path

    def accuracy(self, store: Store, head: Head) -> float:
        """Top-1 in per cent on the test videos of a store, modulated where that is possible."""
        features, rows = judged_features(store, store.split("test"), 8)
        labels = torch.from_numpy(store.labels[store.positions(rows)].astype(np.int64))
        text = torch.from_numpy(store.class_text("name").embeddings)
        modulate = can_modulate(head, len(text))
        return percent(view_cosines(head, features, text, modulate)[:, 0].argmax(1) == labels)

    def run(
        self,
        head: MethodConfig,
        training: TrainConfig,
        rows: Any,
        *,
        validation: Validation | None = None,
        repeats: int = 1,
    ) -> dict[str, Any]:
        """Train and test one head: accuracies in per cent, seconds, and what was chosen."""
        run_dir = common.fresh(self.folder) / "run"
        started = time.perf_counter()
        summary = train_head(
            *(self.known, run_dir, head, training),
            rows=rows,
            prompt_set="name",
            validation=validation,
            repeats=repeats,
            device="cpu",
        )
        seconds, trained = time.perf_counter() - started, load_head(run_dir)
        found = summary.validation
        return {
            "closeset": self.accuracy(self.known, trained),
            "zeroshot": self.accuracy(self.new, trained),
            "seconds": seconds,
            "training": training.to_json(),
            "head": head.to_json(),
            "validation": found,
        }

    def recipe(self, name: str) -> dict[str, Any]:
        """Train and test as `train-head --recipe NAME` does."""
        recipe, store = load_recipe(name), self.known
        rows, validation = choose_validation(
            *(store, store.split("train")),
            split="train",
            hold_out=bool(recipe.training.get("keep_best")),
        )
        training, repeats = recipe.fitted(
            videos=len(rows), classes=len(store.class_names), dim=store.provenance.dim
        )
        head = recipe.head_config(store.provenance.dim)
        return self.run(head, training, rows, validation=validation, repeats=repeats)

    def drawn(self, draw: random.Random, most_steps: int) -> dict[str, Any]:
        """Train and test with options drawn at random, log-uniform where sizes matter."""
        store, rows = self.known, self.known.split("train")
        batch = min(draw.choice((16, 32, 64, 128, 256)), len(rows))
        steps = 10 ** draw.uniform(1.5, math.log10(most_steps))
        passes = steps * batch / len(rows)
        repeats = max(1, int(passes / EPOCHS))  # every epoch writes a state
        epochs = max(1, round(passes / repeats))
        training = TrainConfig(
            epochs=epochs,
            warmup_epochs=epochs * draw.choice((0.0, 0.05, 0.15)),
            lr=10 ** draw.uniform(-4.3, -2.3),
            weight_decay=draw.choice((0.01, 0.05, 0.2, 0.5)),
            batch_size=batch,
            shrinkage=draw.choice((0.0, 0.0, 0.3)),
        )
        kind = draw.choice(("mote", "mote", "transformer"))
        layers = draw.choice((1, 2, 4, 4))
        head = load_recipe("frozen-store").head_config(
            store.provenance.dim, kind=kind, layers=layers
        )
        return self.run(head, training, rows, repeats=repeats)


def main() -> None:
    """Measure every size at every width."""
    chosen = common.options(
        __doc__, sizes="5,20,100", dims="64", searches=40, seed=21, val=0, steps=1500
    )
    if chosen.quick:
        chosen.sizes, chosen.searches, chosen.steps = "20", 3, 60
    where = common.machine()
    rows, shown, details = [], [], []
    runs = tempfile.mkdtemp()  # TMPDIR may be in memory: every epoch writes a state
    for dim in map(int, chosen.dims.split(",")):
        for videos in map(int, chosen.sizes.split(",")):
            known, new = world_store(videos, dim, chosen.seed, chosen.val)
            trial = Trial(known, new, Path(runs) / "recipe-runs")
            auto, paper = trial.recipe("auto"), trial.recipe("paper-vit-b16")
            mean = trial.run(
                load_recipe("frozen-store").head_config(dim, kind="mean"),
                TrainConfig(),
                known.split("train"),
            )
            draw = random.Random(f"{videos}-{dim}")
            found = [trial.drawn(draw, chosen.steps) for _ in range(chosen.searches)]
            best = max([*found, auto], key=lambda run: float(run["closeset"]))
            short = best["closeset"] - auto["closeset"]
            line = [run["closeset"] for run in (mean, paper, auto, best)]
            line += [short, *(run["zeroshot"] for run in (auto, paper, mean)), auto["seconds"]]
            shown.append([videos, dim, *line])
            details.append({"videos": videos, "dim": dim, "auto": auto, "paper": paper})
            details[-1] |= {"mean": mean, "search": found}
            common.table(HEADER, shown[-1:])
            rows.append(
                common.Row(
                    f"`train-head` without options, {videos} videos, {dim} wide, close-set",
                    f"{auto['closeset']:.1f} %",
                    f"{best['closeset']:.1f} %, the best of {chosen.searches} runs",
                    auto["closeset"] / best["closeset"],
                    "3 points",
                )
            )
    shutil.rmtree(runs)
    common.table(HEADER, shown)
    common.save("recipe", where, rows, {"options": vars(chosen), "sets": details})


HEADER = (
    *("videos", "width", "no head", "paper", "auto", "best", "short by"),
    *("zero-shot", "paper's", "no head's", "seconds"),
)


if __name__ == "__main__":
    main()
