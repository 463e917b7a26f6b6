"""Few-shot and base to novel in the demo's generated world: which method learns what from little?

    .venv/bin/python benchmarks/world_protocols.py --seeds 3

Every seed draws a world of its own, whose 40 known classes are trained on and tested: with K videos
of each class, and with 16 videos of each base class, tested on base and on novel classes. Every
number comes from the commands that a user would type. The result is written after every seed, and
what an earlier run finished is not done again. The settings below were chosen on world 11 alone,
which is not among the seeds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

import common

from featstore.workspace import Workspace
from heads.demo import PROMPTS, SAMPLING, DemoWorld
from pipeline.demo.small_clip import ENCODER_NAME
from tests.support.processes.command_line import done

SHOTS: Final = (4, 16)
BASE_SHOTS: Final = 16
EPOCHS: Final[dict[Any, int]] = {4: 20, 16: 10, "base": 20}
"""Of a training end to end: 100, 200 and 200 steps of 32 clips; 20 classes are base."""
FRAMES: Final = 8
BOTH: Final = {"recipe": "demo", "method": "mean", "train": "both-towers", "blend": 1}
MOTE: Final = {"recipe": "demo", "epochs": 30}
METHODS: Final[dict[str, tuple[bool, dict[str, Any]]]] = {
    "CLIP, mean of frames": (False, {"head": "mean"}),
    "MoTE": (False, MOTE),
    "MoTE, modulation off": (False, MOTE | {"no_modulate": True}),
    "full fine-tuning": (True, BOTH | {"lr": 5e-4}),
    "MSTA (CLIP)": (True, {"recipe": "demo-msta"}),
}
"""Whether a method is trained by `finetune`, and its options of that command; else those of `eval`,
which trains such a head itself. Full fine-tuning is that of both towers of the CLIP, without a
head."""
COLUMNS: Final = (*(f"{shots} shots" for shots in SHOTS), "base", "novel", "harmonic mean")


class Measured:
    """The world of one seed, and what the methods reach in it."""

    def __init__(self, root: Path, seed: int) -> None:
        self.world = DemoWorld.make(Workspace(root), seed)
        self.world.extract(ENCODER_NAME)
        self.data = self.world.dataset("known")

    def mote(self, *words: object, **options: object) -> Any:
        """The result of a command in this workspace."""
        for name, value in options.items():
            words += (f"--{name.replace('_', '-')}", *(() if value is True else (value,)))
        return done(*map(str, words), "--root", str(self.world.workspace.root))

    def on_features(self, method: str, how: Mapping[str, Any]) -> list[float]:
        """Accuracies in per cent, by `COLUMNS`, of a method on the features of the frozen CLIP."""
        path = self.world.workspace.store_path(
            self.data, encoder=ENCODER_NAME, sampling=SAMPLING.text
        )
        same = {**how, "store": path.stem, "no_best_epoch": True}
        few, base = ",".join(map(str, SHOTS)), {"shots": BASE_SHOTS, "draw_seeds": 1}
        return accuracies(
            self.mote("eval", fewshot=self.data, shots=few, **same),
            self.mote("eval", base_to_novel=self.data, **base, **same),
        )

    def tuned(self, method: str, how: Mapping[str, Any]) -> list[float]:
        """Accuracies in per cent, by `COLUMNS`, of a method that is trained end to end."""
        few = [self.tune(method, how, shots=shots, epochs=EPOCHS[shots]) for shots in SHOTS]
        base = self.tune(method, how, shots=BASE_SHOTS, classes="base", epochs=EPOCHS["base"])
        return accuracies(
            self.mote("eval", fewshot=self.data, head=",".join(few)),
            self.mote("eval", base_to_novel=self.data, head=base),
        )

    def tune(self, method: str, how: Mapping[str, Any], **drawn: Any) -> str:
        """Train one run and extract its features; return its name."""
        kind = method.split()[0].lower()
        name = f"{kind}-{drawn.get('classes', 'all')}-k{drawn['shots']}-{self.world.seed}"
        same = {"dataset": self.data, "prompts": PROMPTS}
        begun = self.world.workspace.run_dir(name).exists()
        self.mote(
            *("finetune", *(["--resume"] if begun else [])),
            **{**same, "name": name, "encoder": ENCODER_NAME, "seed": self.world.seed},
            **{"frames": FRAMES, "evaluate_every": 0, **drawn, **how},
        )
        tower = {"head" if kind == "msta" else "encoder": name}
        self.mote(
            "extract",
            **{**same, "split": "val", "sampling": f"uniform:{FRAMES}", "precision": "fp32"},
            **tower,
        )
        return name


def accuracies(few: Any, base: Any) -> list[float]:
    """What two reports say, by `COLUMNS`."""
    shown = [run["last"]["top1"] for run in few["runs"]]
    return [*shown, base["base"], base["novel"], base["harmonic_mean"]]


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation of the population."""
    return f"{statistics.fmean(values):.1f} ± {statistics.pstdev(values):.1f}"


def main() -> None:
    """Measure the worlds one after another, and print the table of all so far."""
    asked = common.options(__doc__, seeds=3, first=0)
    where = common.machine()
    found: dict[str, dict[str, list[float]]] = {}
    seconds = []
    for seed in range(asked.first, asked.first + (1 if asked.quick else asked.seeds)):
        started = time.perf_counter()
        world = Measured(common.WORK / "world-protocols", seed)
        for name, (end_to_end, how) in METHODS.items():
            top1 = (world.tuned if end_to_end else world.on_features)(name, how)
            found.setdefault(name, {})[str(seed)] = top1
            print(seed, name, *(f"{value:.1f}" for value in top1), flush=True)
        seconds.append(round(time.perf_counter() - started))
        common.save("world-protocols", where, [], {"top1": found, "seconds": seconds})
    print(f"| method | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for name, of_seeds in found.items():
        cells = [spread(column) for column in zip(*of_seeds.values(), strict=True)]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
