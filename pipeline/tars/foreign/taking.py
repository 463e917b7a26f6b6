"""Makes a data set of tars that somebody else wrote, without copying them.

`dataset.json` names the tars by path or URL; beside it lies an index for every tar, with the key,
place, class, caption and hash of each video, so that extraction reads by offset. No sample is lost:
what cannot be used is in `failures.csv`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from featstore.commands import FOUND_TARS, remember_packing
from featstore.errors import UserError, WorkError, counted
from featstore.files.durable import sweep_partials
from featstore.files.key_lists import Excluded
from featstore.files.locks import exclusive
from featstore.files.machine import usable_cores
from featstore.progress import ProgressSink, no_progress
from pipeline.tars.dataset import DATASET_FILE, Dataset, load_dataset
from pipeline.tars.finished import RECORDS_FOLDER, excluded_before, remember_excluded
from pipeline.tars.foreign.assembly import Assembly
from pipeline.tars.foreign.classes import ClassChoice
from pipeline.tars.foreign.scanning import FoundTar, scanned
from pipeline.tars.foreign.sources import NamedTar, named_tars
from pipeline.tars.identical import identical_videos
from pipeline.tars.packing import check_arguments
from pipeline.tars.plan import PLAN_FILE, class_difference
from pipeline.tars.summary import PackSummary

logger = logging.getLogger(__name__)


def pack_tars(
    patterns: Sequence[str],
    name: str,
    dataset_dir: Path,
    *,
    classes: ClassChoice | None = None,
    workers: int | None = None,
    max_failures: float = 0.05,
    append: bool = False,
    exclude: Path | None = None,
    asked: Sequence[str] = (),
    progress: ProgressSink = no_progress,
) -> PackSummary:
    """Read WebDataset tars and make a data set of them in `dataset_dir`; they stay where they lie.

    `patterns` as in `named_tars`, `classes` says where classes come from. Every video is probed
    and hashed, and so is every tar; an interrupted run continues. Samples that cannot be used are
    listed in `failures.csv`; if their share is above `max_failures`, the summary has
    `too_many_failures`. With `append`, tars that are new since then come after the earlier ones.
    The samples whose keys the list `exclude` names are left out.
    `progress` counts tars. `asked` are the words of the command, for messages that name it.
    Raises UserError for wrong input and for tars that changed since they were packed, WorkError
    for files that are no tars (after the others are read) and when the storage fails.
    """
    began = time.monotonic()
    check_arguments(name, workers, max_failures)
    choice = classes or ClassChoice()
    named = named_tars(patterns)
    try:
        with exclusive(dataset_dir / RECORDS_FOLDER / "lock", f"packing into {dataset_dir}"):
            sweep_partials(dataset_dir)
            before = _earlier(dataset_dir)
            if before is None:
                remember_packing(dataset_dir, asked)
            else:
                named = _continued(before, named, append)
            records = dataset_dir / RECORDS_FOLDER
            folder = records / FOUND_TARS
            found = scanned(
                [tar.source for tar in named],
                folder,
                (choice.field, "" if choice.annotations else choice.cells),
                workers or usable_cores(),
                progress,
            )
            tars = _require_tars(list(found), dataset_dir)
            excluded = None if exclude is None else _leave_out(tars, exclude)
            made = Assembly(name, dataset_dir, named, tars, choice, before)
            back = excluded_before(records, [s.key for tar in tars for s in tar.samples])
            _require_same(before, made.dataset, back)
            written = made.write(before)
            remember_packing(dataset_dir, asked)
            remember_excluded(records, excluded)
    except OSError as error:
        where = error.filename or dataset_dir
        raise WorkError(
            f"cannot write {str(where)!r}: {error.strerror or error}; fix it and run the same "
            "command again, what is read is remembered"
        ) from error
    if not written:
        made.notes.append(f"data set {name!r} is packed already: nothing to do")
    for note in made.notes:
        logger.warning("%s", note)
    dataset, failures = made.dataset, made.failures
    return PackSummary.of(
        dataset,
        failures,
        max_failures,
        shards_written=0,
        shards_skipped=len(dataset.tars),
        seconds=time.monotonic() - began,
        notes=tuple(made.notes),
        identical=identical_videos(made.hashed),
        excluded=excluded,
        left_out=made.left_out,
    )


def _leave_out(tars: list[FoundTar], exclude: Path) -> Excluded:
    """Take the samples that a list names out of the tars; return which ones."""
    keys = [sample.key for tar in tars for sample in tar.samples]
    excluded = Excluded.of(exclude, keys)
    excluded.require_some_of(keys, "samples")
    gone = frozenset(excluded.keys)
    for tar in tars:
        tar.samples[:] = (sample for sample in tar.samples if sample.key not in gone)
    return excluded


def _earlier(dataset_dir: Path) -> Dataset | None:
    """Return the data set that was made of tars here before, if any; UserError for another."""
    if not (dataset_dir / DATASET_FILE).is_file():
        if (dataset_dir / RECORDS_FOLDER / PLAN_FILE).exists():
            raise UserError(
                f"{str(dataset_dir)!r} was begun with --videos: use another --dataset name or "
                "delete it"
            )
        return None
    before = load_dataset(dataset_dir)
    if not all(tar.source for tar in before.tars):
        raise UserError(
            f"{str(dataset_dir)!r} holds a data set that was packed with --videos: use another "
            "--dataset name"
        )
    return before


def _continued(before: Dataset, named: list[NamedTar], append: bool) -> list[NamedTar]:
    """Return the tars in the order of the earlier data set, new ones last; UserError as `_refuse`.

    Tars that had no sample with a row are not in the data set, so they count as new.
    """
    by_source = {tar.source: tar for tar in named}
    known = [tar.source for tar in before.tars]
    # A tar without any row is named in the left-out samples only.
    seen = {*known, *(failed.key for failed in before.left_out)}
    removed = [source for source in known if source not in by_source]
    added = [tar for tar in named if tar.source not in seen]
    if removed:
        gone = counted(len(removed), "tar is", "tars are")
        _refuse(before, [f"{gone} not named any more (e.g. {removed[0]})"])
    if added and not append:
        raise UserError(
            f"--tars names {counted(len(added), 'tar')} that data set {before.name!r} does not "
            f"have (e.g. {added[0].source}): add --append to take them, too, or use another "
            "--dataset name"
        )
    return [by_source[source] for source in known] + [
        tar for tar in named if tar.source not in set(known)
    ]


def _refuse(before: Dataset, changes: Sequence[str], back: str = "") -> None:
    again = f"{back}: give the list again, or " if back else ""
    raise UserError(
        f"the input of data set {before.name!r} has changed since it was packed: "
        f"{'; '.join(changes)}; {again}use another --dataset name or delete {str(before.folder)!r}"
    )


def _require_same(before: Dataset | None, now: Dataset, back: str) -> None:
    """Raise UserError if an earlier tar, class or split is another one now.

    `back` are the samples of now that a list left out before, in words (`excluded_before`).
    """
    if before is None or before.fingerprint == now.fingerprint:
        return
    changes = []
    length = len(before.class_names)
    if (before.raw_class_names, before.class_names) != (
        now.raw_class_names[:length],
        now.class_names[:length],
    ) or bool(before.class_names) != bool(now.class_names):
        changes.append(class_difference(before.raw_class_names, now.raw_class_names))
    if before.multi_label != now.multi_label:
        changes.append(f"multi_label was {before.multi_label}, is {now.multi_label}")
    after = {tar.source: tar for tar in now.tars}
    by_kind: dict[str, list[str]] = {}
    for tar in before.tars:
        other = after.get(tar.source)
        if other is None or other.sha256 != tar.sha256:
            by_kind.setdefault("with other content", []).append(tar.source)
        elif other != tar:
            by_kind.setdefault("with other classes, splits or failures", []).append(tar.source)
    changes += [
        f"{len(sources)} {'tar' if len(sources) == 1 else 'tars'} {kind} (e.g. {sources[0]})"
        for kind, sources in by_kind.items()
    ]
    if not changes and len(now.tars) == len(before.tars):
        changes = ["other samples are left out, or the options on names are others"]
    if changes:
        _refuse(before, changes, back)


def _require_tars(found: Sequence[FoundTar | str], dataset_dir: Path) -> list[FoundTar]:
    unusable = [problem for problem in found if isinstance(problem, str)]
    if unusable:
        more = f" and {len(unusable) - 2} more" if len(unusable) > 2 else ""
        raise WorkError(
            f"{len(unusable)} of {len(found)} tars cannot be used: {', '.join(unusable[:2])}{more}"
            "; the others are remembered: correct these or leave them out of --tars, and run "
            "the command again"
        )
    return [tar for tar in found if isinstance(tar, FoundTar)]
