"""Assembles a data set from what tars hold: classes, splits, keys, and what is left out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from featstore.errors import UserError, counted, one_line, quoted
from featstore.files.durable import write_bytes
from pipeline.annotations.left_out import LeftOut
from pipeline.annotations.listing import ordered_splits
from pipeline.tars.dataset import (
    FAILURE_COLUMNS,
    NO_LABEL,
    Dataset,
    FailedVideo,
    Tar,
    class_words,
    write_failures,
)
from pipeline.tars.foreign.classes import ClassChoice, classes_of
from pipeline.tars.foreign.samples import FoundSample
from pipeline.tars.foreign.scanning import FoundTar
from pipeline.tars.foreign.sources import NamedTar
from pipeline.tars.identical import HashedVideo

_FILE_NAME_LENGTH = 200  # of the index's name, with room for ".json" and a temporary ending


class Assembly:
    """The data set that tars give, its index files and the lines of its `failures.csv`."""

    def __init__(
        self,
        name: str,
        folder: Path,
        named: Sequence[NamedTar],
        found: Sequence[FoundTar],
        choice: ClassChoice,
        before: Dataset | None,
    ) -> None:
        """`found` is what the tars `named` hold; the first of them are those of `before`.

        Raises UserError if no sample can be used, and as `classes_of`.
        """
        self.failures: list[dict[str, Any]] = []
        self.hashed: list[HashedVideo] = []
        self._left_out: list[FailedVideo] = []
        self._contents: dict[str, bytes] = {}
        first: dict[str, tuple[int, FoundSample]] = {}
        repeated: list[tuple[int, FoundSample]] = []
        for number, tar in enumerate(found):
            for sample in tar.samples:
                if first.setdefault(sample.key, (number, sample))[1] is not sample:
                    repeated.append((number, sample))
        if not first:
            raise UserError(
                f"the {len(found)} tars hold no samples: --tars takes tars whose members are "
                "named KEY.EXTENSION, such as clip1.mp4 and clip1.json"
            )
        self._named, self._found, self._first = named, found, first
        chosen = [first[key][1] for key in sorted(first)]
        earlier = before.raw_class_names if before is not None else ()
        fields: Counter[str] = Counter()
        for tar in found:
            fields.update(tar.fields)
        self._several = bool(choice.cells)
        self._classes = classes_of(chosen, choice, fields, earlier)
        self._words = choice.naming.names(self._classes.names)
        any_named = any(tar.split for tar in named)
        self._splits: dict[str, tuple[str, ...]] = {
            key: (named[number].split,) if named[number].split else ()
            for key, (number, _) in first.items()
        }
        if not any_named:
            self._splits.update(self._classes.splits_of)
        passed_over = sum(len(tar.passed_over) for tar in found)
        self.left_out = LeftOut(Counter({"": passed_over} if passed_over else {}))
        names = ordered_splits(split for splits in self._splits.values() for split in splits)
        self.notes = [*self._classes.notes, *_notes(found)]
        for number, sample in repeated:
            other = named[first[sample.key][0]].source
            self._leave_out(number, sample, f"its key is already in {other}: rename the sample")
        keys: dict[str, list[str]] = {split: [] for split in names}
        tars = []
        for number, file in enumerate(_file_names([tar.source for tar in named])):
            if (made := self._tar(number, file, keys)) is not None:
                tars.append(made)
        self.failures.sort(key=lambda line: str(line["key"]))
        self.dataset = Dataset(
            folder=folder,
            name=name,
            class_names=self._words,
            raw_class_names=self._classes.names,
            split_names=tuple(names),
            splits_disjoint=any_named,
            tars=tuple(tars),
            keys_by_split={split: tuple(sorted(group)) for split, group in keys.items()},
            label_map=self._classes.label_map,
            left_out=tuple(sorted(self._left_out, key=lambda video: (video.key, video.reason))),
            multi_label=self._several,
        )
        if not self.dataset.packed:
            example = self.failures[0]
            raise UserError(
                f"none of the {len(first)} samples can be used ({example['key']}: "
                f"{example['reason']}): check --tars and where the classes come from"
            )

    def write(self, before: Dataset | None) -> bool:
        """Write indexes, `failures.csv` and `dataset.json`; False if they are there already."""
        files = {
            self.dataset.index_path(tar): self._contents[tar.file] for tar in self.dataset.tars
        }
        wrong = [
            path
            for path, content in files.items()
            if not path.is_file()
            or path.stat().st_size != len(content)
            or path.read_bytes() != content
        ]
        if not wrong and before is not None and before.fingerprint == self.dataset.fingerprint:
            return False
        for path in wrong:
            write_bytes(path, files[path])
        write_failures(self.dataset.folder, self.failures)
        self.dataset.write()
        return True

    def _tar(self, number: int, file: str, keys: dict[str, list[str]]) -> Tar | None:
        """Return a tar of the data set and keep its index; None if no sample of it has a row."""
        tar, source = self._found[number], self._named[number].source
        entries: list[dict[str, Any]] = []
        failed: list[FailedVideo] = []
        for sample in tar.samples:
            if self._first[sample.key][1] is not sample:
                continue  # another tar had this key before
            spans = self._classes.spans_of.get(sample.key)
            if self._classes.names and spans is None:
                why = self._classes.why_not.get(sample.key) or "nothing names one"
                self._leave_out(number, sample, sample.reason or f"it has no class: {why}")
                continue
            splits = self._splits.get(sample.key, ())
            for split in splits:
                keys[split].append(sample.key)
            label, shown = NO_LABEL, spans or ()
            if not self._several and shown:
                label, shown = shown[0].label, ()
            words = "" if label == NO_LABEL else self._words[label]
            said = class_words(self._words, label, shown)
            if sample.reason:
                video = FailedVideo(sample.key, label, words, splits, sample.reason, shown)
                failed.append(video)
                self._list(number, sample.member, replace(video, class_name=said))
                continue
            path = f"{source}:{sample.member}"
            self.hashed.append(HashedVideo(sample.key, path, said, splits, sample.sha256))
            entries.append(
                {
                    "key": sample.key,
                    "class_name": words,
                    "raw_class_name": "" if label == NO_LABEL else self._classes.names[label],
                    "label": label,
                    **({"spans": [s.to_json() for s in shown]} if self._several else {}),
                    **sample.facts,
                    "sha256": sample.sha256,
                    "splits": list(splits),
                    "member": sample.member,
                    "offset": sample.offset,
                    "size": sample.size,
                    "caption": sample.caption,
                }
            )
        no_row = "" if entries or failed else "no sample of it can have a row"
        if problem := tar.problem or no_row:
            video = FailedVideo(source, NO_LABEL, "", (), one_line(f"the tar: {problem}"))
            self._left_out.append(video)
            self._list(number, "", video)
        if no_row:
            return None
        content = json.dumps(entries, ensure_ascii=False, allow_nan=False).encode()
        self._contents[file] = content
        return Tar(
            file=file,
            split=self._named[number].split or None,
            samples=len(entries),
            failed=tuple(failed),
            bytes=tar.bytes,
            sha256=tar.sha256,
            source=source,
            index_sha256=hashlib.sha256(content).hexdigest(),
        )

    def _leave_out(self, number: int, sample: FoundSample, reason: str) -> None:
        """List a sample that can have no row: one without a class, or with a key of another."""
        video = FailedVideo(sample.key, NO_LABEL, "", (), one_line(reason))
        self._left_out.append(video)
        self._list(number, sample.member, video)

    def _list(self, number: int, member: str, video: FailedVideo) -> None:
        path = ":".join(filter(None, (self._named[number].source, member)))
        line = (video.key, path, video.class_name, video.splits, video.reason)
        self.failures.append(dict(zip(FAILURE_COLUMNS, line, strict=True)))


def _notes(found: Sequence[FoundTar]) -> list[str]:
    """Return what the user should know beside the failures."""
    notes = [
        f"{tar.source}: {tar.problem}; its samples up to there are used; fetch it again "
        "under another --dataset name for the rest"
        for tar in found
        if tar.problem
    ]
    passed_over = [member for tar in found for member in tar.passed_over]
    if passed_over:
        notes.append(
            f"{counted(len(passed_over), 'member has', 'members have')} no name KEY.EXTENSION, and "
            "so no sample "
            f"(first: {quoted(passed_over[0], 80)})"
        )
    named = [s for tar in found for s in tar.samples if s.label or s.labels is not None]
    unread = [s for s in named if s.unread]
    if unread:
        notes.append(
            f"{counted(len(unread), 'sample has', 'samples have')} a JSON that cannot be read, "
            "which may hold captions "
            f"(first: {unread[0].key}: {unread[0].unread})"
        )
    return notes


def _file_names(sources: Sequence[str]) -> list[str]:
    """Return a plain file name for every tar, its own where no earlier one has it.

    The names of earlier tars do not depend on later ones.
    """
    names: dict[str, None] = {}
    for source in sources:
        parts = [part for part in PurePosixPath(source).parts if part not in ("/", "..")]
        parts = ["".join(c if c.isprintable() and c != "\\" else "_" for c in p) for p in parts]
        choices = ["-".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        choices.append(hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest())
        fitting = (
            name
            for name in choices
            if name not in names and len(name.encode()) <= _FILE_NAME_LENGTH and name[0] != "."
        )
        names[next(fitting, choices[-1])] = None
    return list(names)
