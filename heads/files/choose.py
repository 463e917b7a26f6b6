"""The head that a user's word means."""

from __future__ import annotations

from pathlib import Path

from featstore.workspace import Workspace
from heads.files.head_file import load_head
from heads.methods.head import Head
from heads.methods.registry import MEAN_OF_FRAMES


def choose_head(
    workspace: Workspace, name: str | None, *, or_mean: bool = False
) -> tuple[Head | None, Path]:
    """The head that `name` means and its run folder; (None, folder) for the mean of frames.

    None means the newest run, or the mean where `or_mean` allows it and nothing was trained.
    Errors as `Workspace.choose_run` and `load_head`.
    """
    if name == MEAN_OF_FRAMES or (name is None and or_mean and not workspace.trained_runs()):
        return None, workspace.run_dir(MEAN_OF_FRAMES)
    run_dir = workspace.choose_run(name)
    return load_head(run_dir), run_dir
