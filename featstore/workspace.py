"""Where things lie under the workspace root, and which store or run a command works on.

`datasets/<name>`, `features/<name>/*.zarr`, `heads/<run>`, `encoders/<name>`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from featstore.commands import STORE_SUFFIX as STORE_SUFFIX
from featstore.commands import Extraction, command, pack_command, packing_begun
from featstore.errors import UserError, WorkError, one_of
from featstore.files.documents import LISTS_LIMIT, found_object
from featstore.format.tiers import EMBEDDINGS
from featstore.opened_stores import OpenedStores as OpenedStores

log = logging.getLogger(__name__)

NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,127}")

HEAD_FILE: Final = "head.safetensors"
CONFIG_FILE: Final = "config.json"
DATASET_FILE: Final = "dataset.json"
FIRST_STAGE: Final = "frozen"
"""The folder in a fine-tuning's run that keeps the head it began with, if both have one name."""
LAST_EPOCH: Final = "last"
"""The folder in a run that keeps the head of its last epoch beside that of its best one."""
WEIGHTS: Final = ("mean", LAST_EPOCH, "best", "teacher")
"""The weights that a run with a teacher keeps, and the folders in it of heads that have them."""
PROTOCOL_FIELD: Final = "protocol"
"""The field in a run's config.json that names the evaluation protocol that trained the run."""


class Workspace:
    """The folder that holds data sets, features, heads and encoders (made as needed)."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def dataset_dir(self, name: str) -> Path:
        """Return the folder of a packed data set; UserError if `name` is no plain file name."""
        return self.root / "datasets" / _checked(name, "data set")

    def features_dir(self, name: str) -> Path:
        """Return the folder of a data set's stores; UserError as `dataset_dir`."""
        return self.root / "features" / _checked(name, "data set")

    def run_dir(self, name: str) -> Path:
        """Return the folder of one trained head; UserError as `dataset_dir`."""
        return self.root / "heads" / _checked(name, "run")

    def head_dir(self, name: str) -> Path:
        """Return the folder of head `RUN`, `RUN/frozen` (before a fine-tuning) or, as `RUN/last`,
        of other `WEIGHTS`.

        UserError as `dataset_dir`.
        """
        run, _, stage = name.partition("/")
        held = stage in (FIRST_STAGE, *WEIGHTS)
        return self.run_dir(run) / stage if held else self.run_dir(name)

    def head_name(self, folder: Path) -> str:
        """Return the name of the head in this folder; the inverse of `head_dir`."""
        return folder.relative_to(self.root / "heads").as_posix()

    def encoder_dir(self, name: str) -> Path:
        """Return the folder of an imported or fine-tuned encoder; UserError as `dataset_dir`."""
        return self.root / "encoders" / _checked(name, "encoder")

    def trained_runs(self) -> list[Path]:
        """Return the folders of runs that hold a finished head, newest config.json first."""
        begun = (self.root / "heads").glob(f"*/{CONFIG_FILE}")
        found = [
            (p.stat().st_mtime_ns, p.parent) for p in begun if (p.parent / HEAD_FILE).is_file()
        ]
        return [folder for _, folder in sorted(found, reverse=True)]

    def stores(self, dataset: str) -> list[Path]:
        """Return the folders of a data set's stores, sorted by name."""
        return sorted(p for p in self.features_dir(dataset).glob(f"*{STORE_SUFFIX}") if p.is_dir())

    def store_path(
        self,
        dataset: str,
        *,
        encoder: str,
        sampling: str,
        crops: int = 1,
        split: str | None = None,
        tier: str = EMBEDDINGS,
    ) -> Path:
        """Return the path of the store that `extract` makes with these options."""
        kept = None if tier == EMBEDDINGS else tier
        made = Extraction(dataset, encoder, sampling, crops, kept, split)
        return self.features_dir(dataset) / made.file_name

    def extracted_datasets(self) -> list[str]:
        """Return the names of the data sets that have features, sorted."""
        stores = (self.root / "features").glob(f"*/*{STORE_SUFFIX}")
        return sorted({path.parent.name for path in stores})

    def packed_datasets(self) -> list[str]:
        """Return the names of the packed data sets, the newest first."""
        packed = (self.root / "datasets").glob(f"*/{DATASET_FILE}")
        found = sorted((path.stat().st_mtime_ns, path.parent.name) for path in packed)
        return [name for _, name in reversed(found)]

    def choose_dataset(self, name: str | None, likely: str = "") -> str:
        """Return `name` or, if it is None, the only data set with features.

        Those without labels do not count beside others. If several have features, `likely` is
        taken if it is one of them, and that is logged.
        Raises UserError if there is no such choice (it lists the data sets) or no features at all
        (it names the command that makes some).
        """
        if name is not None:
            return name
        every = self.extracted_datasets()
        found = [dataset for dataset in every if not self.unlabelled(dataset)] or every
        if not found:
            raise UserError(
                f"no features under {self.root / 'features'}: run `{self.first_command()}` first"
            )
        if likely in found and len(found) > 1:
            log.info(
                "data set: %s, which the newest head was trained on; --dataset chooses another "
                "of %s",
                *(likely, ", ".join(found)),
            )
            return likely
        if len(found) > 1:
            raise UserError(
                f"several data sets have features ({', '.join(found)}): name one with --dataset"
            )
        words = "features" if found == every else "features and labels"
        log.info("data set: %s, the only one with %s", found[0], words)
        return found[0]

    def first_command(self) -> str:
        """Return the command that brings this workspace nearer to its first head."""
        for dataset in self.extracted_datasets():
            split = training_split(list(self.packed_splits(dataset) or ()))
            if split is not None and not self.unlabelled(dataset):
                return command("train-head", dataset=dataset, split=split, root=self.root)
        for dataset in self.packed_datasets():
            if not self.unlabelled(dataset):
                return Extraction(dataset).command(self.root)
        begun = (path for path in sorted((self.root / "datasets").glob("*")) if packing_begun(path))
        for folder in begun:
            if not (folder / DATASET_FILE).is_file():
                return pack_command(folder, self.root)[0]
        return command("pack", dataset="NAME", videos="DIR", root=self.root)

    def opened(self, dataset: str) -> OpenedStores:
        """Return the stores of a data set as an object that opens each of them only once."""
        return OpenedStores(self, dataset)

    def packed_splits(self, dataset: str) -> dict[str, bool] | None:
        """Return the splits that dataset.json names, and whether each has tars of its own.

        None if the data set is not here or its file cannot be read; packing and extracting report
        what is wrong with that file.
        """
        try:
            packed = found_object(self.dataset_dir(dataset) / DATASET_FILE, LISTS_LIMIT) or {}
            own_tars = bool(packed["splits_disjoint"])
            return {str(name): own_tars for name in packed["split_names"]}
        except (LookupError, TypeError):
            return None

    def unlabelled(self, dataset: str) -> bool:
        """Return whether the videos of a data set have no classes, as far as that can be read."""
        from featstore.format.metadata import read_metadata  # loads numpy

        packed = found_object(self.dataset_dir(dataset) / DATASET_FILE, LISTS_LIMIT)
        if packed is not None:
            return packed.get("class_names") == []
        for store in self.stores(dataset):
            with suppress(UserError, WorkError):
                return not read_metadata(store).class_names
        return False

    def own_runs(self) -> list[Path]:
        """Return `trained_runs` without those that an evaluation trained for itself."""
        return [run for run in self.trained_runs() if not _is_part_of_protocol(run)]

    def choose_run(self, name: str | None) -> Path:
        """Return the folder of the named head, or of the newest; it holds head.safetensors.

        Without a name, runs that an evaluation trained (few-shot, base-to-novel) and first stages
        of fine-tunings (`RUN/frozen`) are not considered. Raises UserError, which lists the runs,
        if there is no head of that name; or which says how to train one, if there is no head.
        """
        wanted = None if name is None else self.head_dir(name)
        if wanted is not None and (wanted / HEAD_FILE).is_file():
            return wanted
        if wanted is not None and (wanted / FIRST_STAGE / HEAD_FILE).is_file():
            raise UserError(
                f"run {name} has no head yet: its fine-tuning is not finished (the command that "
                f"began it continues it with --resume); it began with --head {name}/{FIRST_STAGE}"
            )
        trained = self.trained_runs()
        if not trained:
            raise UserError(
                f"no trained head under {self.root / 'heads'}: run `{self.first_command()}` first "
                "(eval and predict also take --head mean, CLIP's mean of frames)"
            )
        if name is not None:
            known = one_of(name, (run.name for run in trained))
            raise UserError(f"no trained head {name!r} in {self.root / 'heads'}: {known}")
        own = next(iter(self.own_runs()), None)
        if own is None:
            raise UserError(
                f"every head under {self.root / 'heads'} was trained by an evaluation: name "
                f"one with --head ({', '.join(run.name for run in trained)})"
            )
        log.info("head: %s, the newest run", own.name)
        return own


def training_split(names: Sequence[str]) -> str | None:
    """Return the split that `train-head` must be given to train on, of a data set with `names`.

    "" means that it needs none: it finds "train" itself, and takes all videos without splits.
    None means that there is nothing to train on.
    """
    if not names or "train" in names:
        return ""
    return next((name for name in names if name.startswith("train")), None)


def _checked(name: str, kind: str) -> str:
    if not NAME_PATTERN.fullmatch(name):
        raise UserError(
            f"{name!r} is no name for a {kind}: use letters, digits, '.', '_', '+' and '-', "
            "beginning with a letter or digit"
        )
    return name


def _is_part_of_protocol(run: Path) -> bool:
    settings = found_object(run / CONFIG_FILE)  # loading the run reports what is wrong with it
    return settings is not None and bool(settings.get(PROTOCOL_FIELD))
