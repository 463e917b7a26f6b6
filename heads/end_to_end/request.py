"""What a fine-tuning is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from heads.end_to_end.chosen_videos import VideoChoice
from heads.end_to_end.config import FinetuneConfig
from heads.methods.settings import MethodConfig
from pipeline.prompts import PromptSet


@dataclass(frozen=True)
class FinetuneRequest:
    """The encoder and head to fine-tune, the data, and the folders of the results."""

    dataset_dir: Path
    run_dir: Path
    encoder_dir: Path
    """Folder in which the tuned encoder is published; it has the name of the run."""
    encoders_dir: Path
    config: FinetuneConfig
    head: Callable[[int], MethodConfig]
    """A function from the embedding width to the new head; not called with `from_head`."""
    encoder: str | None = None
    """Spec of the CLIP to begin with; None means the one that `from_head` was trained on."""
    from_head: Path | None = None
    """Folder of the run whose head to begin with; `run_dir` itself for a second stage in it."""
    split: str | None = None
    """Training split; None means "train", or all videos of a data set without splits."""
    eval_split: str | None = None
    """Evaluation split; None means "val", else "test", else no evaluation."""
    prompt_set: str | PromptSet | None = None
    """Name, or file of templates or descriptions; None means that of `from_head`, else "mote28"."""
    guides: Path | None = None
    """File of class descriptions (`pipeline.descriptions`), for a method that adapts both towers;
    None means templates."""
    tokens: bool = False
    """Whether what lies below the adapters of such a method is read from a store of tokens."""
    exclude: Path | None = None
    """List of videos to leave out of training and evaluation (`featstore.files.key_lists`)."""
    choice: VideoChoice = field(default_factory=VideoChoice)
    """The shots and the half of the classes to train on, by default everything."""
    method: str | None = None
    """Name of the method that must be trained; None: any."""
    resume: bool = False
    decoder: str = "auto"
    workers: int | None = None
    """Decode threads of this process; None means its share of the machine's cores."""
    checkpoint_every: int | None = None
    """Steps between checkpoints inside an epoch; None means every ten minutes."""
