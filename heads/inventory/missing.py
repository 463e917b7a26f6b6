"""Says what is missing in a workspace for what, and the command that makes it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from featstore.commands import ADAPTED_BY, PACKING_FOLDER, command, pack_command, packing_begun
from featstore.errors import counted
from featstore.files.locks import holder
from featstore.reading.repair import repair_command
from featstore.workspace import DATASET_FILE, HEAD_FILE, Workspace
from heads.evaluation.next_steps import (
    after_extraction,
    after_packing,
    evaluation_of,
    more_videos,
)
from heads.inventory.contents import Contents, HeldHead, HeldStore
from pipeline.encoders.specs import local_encoder


@dataclass(frozen=True)
class Step:
    """Something that is missing, and the command that makes it; `about` names what lacks it."""

    about: str
    missing: str
    command: str | None
    """None if the workspace does not know the command, which `missing` then describes."""

    @property
    def line(self) -> str:
        """The step as one line of text."""
        return f"{self.about}: {self.missing}" + (f": `{self.command}`" if self.command else "")


def next_steps(contents: Contents) -> list[Step]:
    """Return what is missing in a workspace, in the order in which it is needed.

    What a running command is making just now is not missing.
    """
    return list(_steps(contents))


def _steps(contents: Contents) -> Iterator[Step]:
    workspace = contents.workspace
    if not (contents.datasets or contents.stores or contents.heads or contents.problems):
        yield Step("workspace", "empty; an example that makes its own videos", command("demo"))
        yield Step("own videos", "how they get in", command("pack", help=True))
        return
    for problem in contents.problems:
        folder = problem.path
        if folder.parent == workspace.root / "datasets" and _is_begun(folder):
            words, whole = pack_command(folder, workspace.root)
            how = "" if whole else f"; `{words}` continues it, with the options that began it"
            yield Step(folder.name, f"packing is not finished{how}", words if whole else None)
    for dataset in contents.datasets:
        if not contents.stores_of(dataset.name) and dataset.videos > dataset.failed:
            steps = after_packing(workspace, dataset.name)
            needs = f", which needs {steps['needs']}" if "needs" in steps else ""
            yield Step(dataset.name, f"packed, not extracted{needs}", steps["next"])
    for store in contents.stores:
        if not store.complete and store.busy is None:
            done = f"{store.tars_done} of {counted(store.metadata.schema.tars, 'tar')} extracted"
            lost = _lost_source(contents, store)
            repair = repair_command(store.folder, store.metadata, workspace.root)
            name = f"{store.dataset}/{store.name}"
            yield Step(name, done + lost, repair if not lost else None)
    own = [head for head in contents.heads if not head.protocol]
    if not any(head.settings for head in own):
        for store in contents.stores:
            if store.complete and store.metadata.schema.pooled and store.metadata.class_names:
                yield Step(store.dataset, "extracted, no head", after_extraction(store.folder))
    for head in own:
        if head.settings and head.busy is None:
            yield from _steps_of(workspace, head)


def _is_begun(folder: Path) -> bool:
    """Return whether packing into a folder was begun and broke off."""
    done = (folder / DATASET_FILE).is_file()
    return not done and packing_begun(folder) and holder(folder / PACKING_FOLDER / "lock") is None


def _lost_source(contents: Contents, store: HeldStore) -> str:
    """Say what an extraction of the store would need and the workspace lacks; "" if nothing."""
    made = store.metadata.provenance
    if made.dataset not in {dataset.name for dataset in contents.datasets}:
        return f"; data set {made.dataset} is not here"
    place = local_encoder(made.encoder, contents.workspace.root / "encoders")
    published = place is None and "/" in made.encoder and not os.path.isabs(made.encoder)
    if made.encoder.startswith(ADAPTED_BY):
        place = contents.workspace.run_dir(made.encoder.removeprefix(ADAPTED_BY)) / HEAD_FILE
    here = published or (place is not None and place.exists())
    return "" if here else f"; encoder {made.encoder} is not here"


def _steps_of(workspace: Workspace, head: HeldHead) -> Iterator[Step]:
    if not head.finished:
        done = f"{head.trained} trained"
        yield Step(head.name, f"{done}; the command that began it continues with --resume", None)
    elif not head.results:
        words, other = evaluation_of(head.folder), more_videos(workspace)
        if words == other:
            missing = (
                "never evaluated, and there is nothing to test it on but what it was trained on"
            )
            yield Step(head.name, f"{missing}; `{other}` brings in more videos", None)
        else:
            yield Step(head.name, "never evaluated", words)
