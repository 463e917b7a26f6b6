"""The four weights of a training with a teacher: the last, the best, their mean and the teacher's.

| weights | |
|---|---|
| `last` | those of the last epoch |
| `best` | those of the epoch with the best top-1 in evaluation |
| `mean` | the plain mean of the weights at the start and after every epoch |
| `teacher` | the teacher's towers, with the head of the last epoch |

All lie in the run's `state/`. The run publishes one of them; a head and an encoder of another are
made when they are asked for (`publish_weights`).

Source: TACO (Zhu et al., NeurIPS 2026) and its released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from torch import Tensor

from featstore.errors import UserError, WorkError
from heads.files.head_file import load_tensors, open_tensors
from heads.files.run_files import BEST_FILE, MEAN_FILE, STATE_FILE
from heads.methods.taco.training import WeightMean
from heads.training.ranks import Ranks
from heads.training.state import save_weights

_PARAMETER: Final = "parameter."
TEACHER: Final = "teacher."
"""What the names of the teacher's parameters begin with in the state."""


def keep_mean(run_dir: Path, parameters: Mapping[str, Tensor], epoch: int) -> None:
    """Take the weights after `epoch` epochs into the run's mean, once; 0 begins it.

    The mean lies in a file, so that memory holds it for a moment only. Raises WorkError if the file
    does not belong to the epoch before.
    """
    file = run_dir / MEAN_FILE
    if not epoch:
        if not file.is_file():
            save_weights(file, parameters, 0, Ranks())
        return
    remedy = "delete the run and train again"
    if not file.is_file():
        raise WorkError(f"{file} is gone, which holds the mean of the weights so far: {remedy}")
    tensors, card = load_tensors(file)
    held = card.get("epoch")
    if held == epoch:
        return  # the run was stopped after this and trained the end of the epoch again
    if held != epoch - 1:
        raise WorkError(f"{file} holds the mean of {held} epochs, not of {epoch - 1}: {remedy}")
    found = {name.removeprefix(_PARAMETER): value for name, value in tensors.items()}
    mean = WeightMean.of_state({"points": epoch, "weights": found})
    mean.add(parameters)
    save_weights(file, mean.weights, epoch, Ranks())


def read_weights(run_dir: Path, which: str) -> dict[str, Tensor]:
    """Return the `which` weights of a run, float32, under the names of `EndToEndModel`.

    Raises UserError if the run has none of that kind.
    """
    file = run_dir / {"best": BEST_FILE, "mean": MEAN_FILE}.get(which, STATE_FILE)
    if not file.is_file():
        why = (
            "it had no evaluation in training"
            if which == "best"
            else f"its {file.relative_to(run_dir)} is gone"
        )
        raise UserError(f"run {run_dir.name} has no {which} weights: {why}; name others")
    with open_tensors(file) as (names, read, _):
        known = set(names)

        def of(name: str) -> str:
            held = f"{TEACHER}{name.removeprefix(_PARAMETER)}"
            return held if which == "teacher" and held in known else name

        found = {
            name.removeprefix(_PARAMETER): read(of(name))
            for name in names
            if name.startswith(_PARAMETER)
        }
        if which == "teacher" and not any(name.startswith(TEACHER) for name in known):
            raise UserError(f"run {run_dir.name} was trained without a teacher: name other weights")
    return found
