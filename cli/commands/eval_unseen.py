"""`mote-cli eval --zeroshot k600`: the classes of Kinetics-600 that Kinetics-400 lacks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from cli.output import warn
from featstore.errors import UserError
from featstore.reading.store import Store
from featstore.workspace import Workspace

if TYPE_CHECKING:
    from heads.evaluation.protocols.protocol import TestSet
    from heads.methods.head import Head
    from heads.methods.settings import HeadOrigin

_SPLITS = ("test", "val")

K600Source = Annotated[
    str | None,
    typer.Option(
        "--k600-source",
        metavar="test|val|FILE",
        help="Videos of Kinetics-600 zero-shot: a split, or a list of names or YouTube ids; "
        "default: test where it was extracted, else val.",
    ),
]
ClassLists = Annotated[
    list[Path] | None,
    typer.Option(
        "--class-lists",
        metavar="DIR|FILE",
        help="Class splits of Kinetics-600 zero-shot, a file of names or numbers each (repeat the "
        "option, or name a folder); default: three drawn here.",
    ),
]
K400Names = Annotated[
    Path | None,
    typer.Option(
        "--k400-names",
        metavar="FILE",
        help="Class names of Kinetics-400; default: the head's, else those of the packed k400.",
    ),
]


@dataclass(frozen=True)
class UnseenChoice:
    """What was asked for; the fields are options of `eval`."""

    source: str | None
    class_lists: tuple[Path, ...]
    k400_names: Path | None

    def require_unused(self, protocol: str) -> None:
        """UserError when something was asked for that `protocol` does not look at."""
        given = {
            "--k600-source": self.source,
            "--class-lists": self.class_lists or None,
            "--k400-names": self.k400_names,
        }
        options = [option for option, value in given.items() if value is not None]
        if options:
            raise UserError(
                f"{', '.join(options)} go with --zeroshot k600, not with {protocol}: leave them out"
            )

    def split(self, workspace: Workspace, dataset: str) -> str | None:
        """The split that is tested; None for a list of videos. UserError when there is none."""
        if self.source is not None and self.source not in _SPLITS:
            return None
        split = self.source or workspace.default_split(dataset, _SPLITS)
        if split is None:
            raise UserError(
                f"no store of {dataset} has a test or val split: extract one, or name a list of "
                "its videos with --k600-source"
            )
        return split

    def tests(
        self, workspace: Workspace, store: Store, head: Head | None
    ) -> tuple[tuple[TestSet, ...], str]:
        """Test sets of unseen classes, each among its own, and where all of it is from, in words.

        Counts that are not the published ones are told.
        """
        from heads.evaluation.protocols.protocol import TestSet
        from heads.training.shots import rows_of_classes
        from pipeline.annotations.key_index import KeyIndex
        from pipeline.annotations.published_lists import read_keys
        from pipeline.annotations.unseen_classes import unseen_classes

        names, names_from = _k400_names(
            workspace, None if head is None else head.origin, self.k400_names
        )
        chosen = unseen_classes(store.class_names, names, self.class_lists)
        for note in chosen.notes:
            warn(note)
        split = self.split(workspace, store.path.parent.name)
        if split is None:
            path = Path(str(self.source))
            keys = read_keys(path, KeyIndex(store.keys)).keys
            rows = np.array(sorted(store.row(key) for key in keys), np.int64)
            videos = f"list {path.name}"
        else:
            rows = store.split(split)
            videos = f"split {split}"
        tests = []
        for name, labels in chosen.splits.items():
            classes = np.array(labels, np.int64)
            of_classes = rows_of_classes(store, rows, classes)
            if not len(of_classes):
                raise UserError(
                    f"none of the {len(rows)} videos of {videos} is of a class of {name}: name "
                    "another --k600-source"
                )
            tests.append(TestSet(name, of_classes, classes))
        return tuple(tests), (
            f"{len(chosen.unseen)} unseen classes (Kinetics-400 names: {names_from}); splits: "
            f"{chosen.source}; videos: {videos}"
        )


def _k400_names(
    workspace: Workspace, origin: HeadOrigin | None, file: Path | None
) -> tuple[list[str], str]:
    """The class names of Kinetics-400 and where they are from."""
    from heads.evaluation.protocols.choose import known_dataset
    from pipeline.annotations.label_names import read_names
    from pipeline.tars.dataset import load_dataset

    if file is not None:
        if not file.is_file():
            raise UserError(f"file of class names {str(file)!r} does not exist: name another")
        return list(read_names(file).values()), file.name
    of_head = origin.class_names if origin is not None else None
    if of_head is not None and origin is not None and known_dataset(origin.dataset) == "k400":
        return list(of_head), "the head's"
    if "k400" in workspace.dataset_names():
        return list(load_dataset(workspace.dataset_dir("k400")).class_names), "the packed k400"
    if of_head is not None and origin is not None:
        return list(of_head), f"the head's, trained on {origin.dataset}"
    raise UserError(
        "which classes are new depends on the names of Kinetics-400: name a file with "
        "--k400-names, pack k400, or test a head that was trained on it; --protocol zeroshot "
        "--dataset k600 tests all its classes"
    )
