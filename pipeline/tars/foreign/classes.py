"""Gives the samples of tars their classes and splits."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from featstore.errors import UserError, counted, one_of, quoted
from featstore.format.spans import Span
from featstore.spelling import comparable, same_letters
from pipeline.annotations.class_names import USUAL_NAMING, Naming, natural_order
from pipeline.annotations.formats.multi_label import CELLS, ROWS, Times, multi_label_rows
from pipeline.annotations.formats.path_label_lists import ListRow, label_names, read_list
from pipeline.annotations.listing import name_from_key
from pipeline.annotations.video_folder import path_stem
from pipeline.tars.foreign.samples import LIST, TAKES_LISTS, FoundSample

_SHOWN_FIELDS = 8

Rows = dict[str, list[tuple[ListRow, Times]]]
"""By the key of a sample: a row for each of its classes, with its times. The label is "" where the
sample shows no class."""


@dataclass(frozen=True)
class ClassChoice:
    """Where classes come from: a mapping CSV `key,class[,split]`, a member or field, or nowhere.

    `field` and `cells` as in `samples.classes_in`, where in a mapping `cells` is one of
    `formats.multi_label.CELLS`; `names_file` gives names to numbers.
    """

    annotations: Path | None = None
    names_file: Path | None = None
    field: str = ""
    unlabelled: bool = False
    naming: Naming = USUAL_NAMING
    cells: str = ""

    def __post_init__(self) -> None:
        chosen = {
            "--annotations": self.annotations is not None,
            "--label-field": bool(self.field),
            "--unlabelled": self.unlabelled,
        }
        given = [option for option, is_given in chosen.items() if is_given]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} contradict each other: give one of them")
        others = {"--class-names": self.names_file is not None, "--multi-label": bool(self.cells)}
        for option, is_given in others.items():
            if self.unlabelled and is_given:
                raise UserError(f"--unlabelled leaves classes out: leave {option} out, too")
        if self.cells not in ("", LIST, *CELLS):
            known = one_of(self.cells, (LIST, *CELLS))
            raise UserError(f"--multi-label {self.cells!r} is unknown: {known}")
        if self.cells == ROWS and self.annotations is None:
            raise UserError(
                "--multi-label rows is for a CSV with a row for each class of a sample: name it "
                "with --annotations, or give list, '|' or ';' for what the samples themselves say"
            )
        if self.cells == LIST and self.annotations is not None:
            raise UserError(
                "--multi-label list is for the samples' own JSON: for --annotations give rows (a "
                "row for each class), or what parts the classes in a cell, '|' or ';'"
            )


@dataclass(frozen=True)
class Classes:
    """The classes of a data set and the class of every sample, by key.

    `names` are raw names in label order, empty for a data set without labels. `spans_of` lacks the
    samples without a class; `why_not` says why, for those. A sample has one class without times,
    or as many as it shows. `splits_of` is filled by a mapping only.
    """

    names: tuple[str, ...]
    spans_of: Mapping[str, tuple[Span, ...]]
    why_not: Mapping[str, str] = field(default_factory=dict)
    splits_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    label_map: str = ""
    notes: tuple[str, ...] = ()


def classes_of(
    samples: Sequence[FoundSample],
    choice: ClassChoice,
    fields: Mapping[str, int],
    earlier: Sequence[str] = (),
) -> Classes:
    """Return the classes of samples with distinct keys; `earlier` classes keep their labels.

    `fields` counts the fields in the JSON of the samples, for messages.

    Raises UserError if the mapping or the field gives no sample a class, and for labels that do
    not fit together.
    """
    if choice.annotations is not None:
        mapped = _mapped(samples, choice.annotations, choice.cells)
        return _named(samples, *mapped, choice, earlier)
    rows: Rows = {}
    for s in samples:
        labels = s.labels if choice.cells else [s.label] if s.label else None
        if labels is not None:
            rows[s.key] = [(ListRow(s.member, label, ""), (None, None)) for label in labels or [""]]
    why_not = {sample.key: sample.unread for sample in samples if sample.key not in rows}
    if choice.unlabelled or not (rows or choice.field or choice.cells):
        return Classes((), {}, notes=(_without_classes(len(samples), choice, fields),))
    if not rows:
        first = next((sample for sample in samples if sample.unread), samples[0])
        raise UserError(
            f"{f'--label-field {choice.field}' if choice.field else '--multi-label'}: none of "
            f"{len(samples)} samples has a class ({first.key}: {first.unread or 'no usual field'})"
            + f"; {_shown(fields)}, or pack with --unlabelled"
            * (TAKES_LISTS not in first.unread)
        )
    origins = Counter(sample.class_from for sample in samples if sample.key in rows)
    if len(origins) > 1:
        told = ", ".join(f"{name!r} ({count} samples)" for name, count in origins.most_common(4))
        raise UserError(f"classes come from {told}: choose one with --label-field")
    said = "" if choice.field else f"classes come from {next(iter(origins))!r} of every sample"
    return _named(samples, rows, why_not, tuple(filter(None, [said])), choice, earlier)


def _named(
    samples: Sequence[FoundSample],
    rows: Rows,
    why_not: Mapping[str, str],
    notes: tuple[str, ...],
    choice: ClassChoice,
    earlier: Sequence[str],
) -> Classes:
    """Give every label text its class name and number."""
    told: list[str] = list(notes)
    members = {sample.key: sample.member for sample in samples}
    labelled = [(key, row) for key, of_key in rows.items() for row, _ in of_key if row.label]
    if not labelled:
        raise UserError("no sample shows a class: name another field or list, or --unlabelled")
    names, order, done = label_names(
        [row for _, row in labelled],
        [members[key] or None for key, _ in labelled],
        choice.names_file,
        Path("/"),
        told.append,
        choice.naming.label_map,
        earlier,
    )
    ordered = order or sorted(set(names.values()), key=natural_order)
    ordered = list(dict.fromkeys((*earlier, *ordered)))
    numbers = {name: number for number, name in enumerate(ordered)}
    return Classes(
        tuple(ordered),
        {
            key: tuple(
                dict.fromkeys(
                    Span(numbers[names[row.label]], *times) for row, times in of_key if row.label
                )
            )
            for key, of_key in rows.items()
        },
        why_not,
        {
            key: tuple(dict.fromkeys(filter(None, ";".join(r.split for r, _ in of_key).split(";"))))
            for key, of_key in rows.items()
        },
        done,
        tuple(told),
    )


def _mapped(
    samples: Sequence[FoundSample], path: Path, cells: str
) -> tuple[Rows, dict[str, str], tuple[str, ...]]:
    """Return the rows of every sample in a mapping, why others have none, and notes.

    A row names a sample by its key, also with the extension, or by the base name where no other
    sample has it; where none is called so, by a name that reads the same (`comparable`). A key may
    have several rows with one class and several splits; with `cells`, also several classes.
    """
    if not path.is_file():
        raise UserError(f"annotations {str(path)!r} do not exist: name a CSV with key,class")
    keys = {name_from_key(sample.key): sample.key for sample in samples}
    keys |= {sample.key: sample.key for sample in samples}
    bases = Counter(posixpath.basename(name_from_key(sample.key)) for sample in samples)
    keys = {
        posixpath.basename(name_from_key(sample.key)): sample.key
        for sample in samples
        if bases[posixpath.basename(name_from_key(sample.key))] == 1
    } | keys

    alike: dict[str, set[str]] = {}
    for name, sample_key in keys.items():
        for text in {same_letters(name), comparable(name)}:
            alike.setdefault(text, set()).add(sample_key)

    def find(listed: str) -> tuple[str | None, str]:
        name = listed.removeprefix("./")
        if found := keys.get(name) or keys.get(path_stem(name)):
            return found, ""
        for form in (same_letters, comparable):
            same = alike.get(form(path_stem(name)), set())
            if len(same) == 1:
                return next(iter(same)), ""
            if same:
                return None, f"several samples have this name: {' and '.join(sorted(same)[:2])}"
        return None, "no sample has this key"

    rows: Rows = {}
    unknown: list[str] = []
    notes: list[str] = []
    listed: list[tuple[ListRow, Times]]
    if cells:
        listed = multi_label_rows(path, cells, notes.append)
    else:
        listed = [(row, (None, None)) for row in read_list(path, find)]
    for row, times in listed:
        key = find(row.path)[0]
        if key is None:
            unknown.append(row.path)
            continue
        of_key = rows.setdefault(key, [])
        if not cells and of_key and of_key[0][0].label != row.label:
            raise UserError(
                f"{str(path)!r} gives {row.path!r} two classes, {of_key[0][0].label!r} and "
                f"{row.label!r}: correct the file, or give --multi-label rows if videos may show "
                "several"
            )
        of_key.append((row, times))
    if not rows:
        example = samples[0].key if samples else ""
        raise UserError(
            f"{str(path)!r} names none of the {len(samples)} samples (it has {unknown[0]!r}, the "
            f"tars have {name_from_key(example)!r}): its first column must hold their keys"
        )
    if unknown:
        notes.append(
            f"of {str(path)!r}, {counted(len(unknown), 'row names', 'rows name')} no sample of the "
            f"tars (first: {quoted(unknown[0], 80)})"
        )
    why_not = {s.key: f"it is not in {path.name}" for s in samples if s.key not in rows}
    return rows, why_not, tuple(notes)


def _without_classes(videos: int, choice: ClassChoice, fields: Mapping[str, int]) -> str:
    said = f"no classes: {counted(videos, 'video')} without labels"
    return said if choice.unlabelled else f"{said}; {_shown(fields)}"


def _shown(fields: Mapping[str, int]) -> str:
    """Say what --label-field could name."""
    if not fields:
        return "name the member or the CSV that holds them with --label-field or --annotations"
    common = ", ".join(sorted(fields, key=lambda name: (-fields[name], name))[:_SHOWN_FIELDS])
    return f"if a field of the JSON holds them ({common}), name it with --label-field"
