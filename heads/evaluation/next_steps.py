"""The command that is worth typing next in a workspace, after each of the others.

Everything is read from small files: the cards of heads, the metadata of stores, `dataset.json`.
No torch is loaded, because a finished extraction is recognised without it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from featstore.commands import (
    ADAPTED_BY,
    DEFAULT_ENCODER,
    Extraction,
    command,
    workspace_of,
)
from featstore.errors import UserError, WorkError
from featstore.files.documents import LISTS_LIMIT, found_object
from featstore.format.metadata import StoreMetadata, read_metadata
from featstore.format.provenance import Provenance
from featstore.format.schema import STATUS_OK
from featstore.reading.repair import extraction_of, repair_command
from featstore.reading.store import Store
from featstore.workspace import DATASET_FILE, FIRST_STAGE, Workspace, training_split
from heads.evaluation.protocols.choose import PROTOCOLS, usual_protocol
from heads.evaluation.wanted_store import extraction_for
from heads.files.head_cards import HeadCard, cards, newest_card, read_card
from heads.files.run_files import read_config
from heads.methods.registry import MEAN_OF_FRAMES, method
from heads.methods.registry import names as method_names
from pipeline.annotations.known_sets import known_dataset

_DEMO: Final = re.compile(r"demo-(clip|(known|new|finetuned)-[0-9-]+)")
"""The names of the data sets and encoders that `mote-cli demo` makes (`heads/demo.py`)."""


def first_extraction(workspace: Workspace, dataset: str) -> Extraction:
    """Return the extraction to begin with: for the newest head, else as the newest store.

    A workspace that has neither has the encoder that was put into it last, or the default one.
    What the demo left counts for its own videos only: its CLIP knows nothing else. Heads that look
    at pixels need no extraction.
    """
    own = None if _DEMO.fullmatch(dataset) else _DEMO.fullmatch
    found = (
        card
        for card in cards(workspace)
        if not _looks_at_pixels(card) and not (own and own(card.origin.dataset or ""))
    )
    card = next(found, None)
    if card is not None and _is_there(workspace, card.origin.encoder):
        known, names = _packed(workspace, dataset)
        other = set(card.origin.class_names or ()) != set(names)
        protocol = usual_protocol("zeroshot", dataset, split_names=known) if other else None
        return extraction_for(dataset, card.origin, protocol=protocol)
    for _, metadata in _newest_stores(workspace):
        made_of = metadata.provenance
        usable = not made_of.of_views and not (own and own(made_of.dataset))
        if usable and _is_there(workspace, made_of.encoder):
            made = extraction_of(metadata.provenance)
            return replace(made, dataset=dataset, split=None, tier=None)
    held = [path for path in (workspace.root / "encoders").glob("[!.]*") if path.is_dir()]
    held = [path for path in held if not (own and own(path.name))]
    newest = max(held, key=lambda path: path.stat().st_mtime_ns, default=None)
    return Extraction(dataset, DEFAULT_ENCODER if newest is None else newest.name)


def after_packing(workspace: Workspace, dataset: str) -> dict[str, str]:
    """Return `next`, the command after `pack`: an extraction, or an evaluation that makes features.

    `needs` says which weights it has to fetch first, unless a store shows that they were here.
    """
    card = newest_card(workspace)
    if card is not None and _looks_at_pixels(card) and not workspace.unlabelled(dataset):
        tested = None
        if dataset == card.origin.dataset:
            tested = _default_test(_packed(workspace, dataset)[0])
        if tested is not None or dataset != card.origin.dataset:
            return {"next": _pixel_evaluation(workspace, card, tested, [dataset])}
    making = first_extraction(workspace, dataset)
    steps = {"next": making.command(workspace.root)}
    spec = str(making.encoder)
    used = {metadata.provenance.encoder for _, metadata in _newest_stores(workspace)}
    if os.path.isabs(spec) or "/" not in spec or spec in used:
        return steps
    needs = (
        f"the weights of {spec}, once, from the model hub or its cache; without network name the "
        f"folder of a CLIP with --encoder, or try `{command('demo')}`"
    )
    return {"needs": needs, **steps}


def after_extraction(store: Path, *, complete: bool = True) -> str:
    """Return the command that uses a store of a workspace, or that finishes it.

    A store elsewhere, without embeddings or without classes is looked at.
    """
    root, metadata = workspace_of(store), read_metadata(store)
    if not complete:
        return repair_command(store, metadata, root)
    frames = metadata.schema.pooled and not metadata.provenance.of_views
    if root is None or not frames or len(metadata.class_names) < 2:
        return command("inspect", store)
    workspace, dataset, made = Workspace(root), store.absolute().parent.name, metadata.provenance
    tower = made.encoder_fingerprint
    fitting = [card for card in cards(workspace) if card.origin.encoder_fingerprint == tower]
    trainable = training_split(_held_splits(metadata))
    own = [card for card in fitting if card.origin.dataset in (dataset, made.dataset)]
    asked = [card for card in fitting if f"{ADAPTED_BY}{card.name}" == made.encoder]
    free = trainable is None or _is_zeroshot_set(dataset)
    for card in own or asked or (fitting if free else []):
        found = _evaluation(workspace, dataset, card, store)
        if found is not None:
            return found
    if trainable is not None and _tells_apart(store, trainable):
        return _training(workspace, dataset, trainable, store, len(workspace.stores(dataset)) > 1)
    return _evaluation(workspace, dataset, None, store) or command("inspect", store)


def after_rewriting(store: Path) -> str | None:
    """Return the command that uses a store made from others; None if it lies in no workspace."""
    root, metadata = workspace_of(store), read_metadata(store)
    if root is None:
        return None
    trainable = training_split(_held_splits(metadata))
    frames = metadata.schema.pooled and not metadata.provenance.of_views
    usable = frames and metadata.class_names
    if trainable is None or not usable or not _tells_apart(store, trainable):
        return after_extraction(store)
    return _training(Workspace(root), store.absolute().parent.name, trainable, store, True)


def after_training(run_dir: Path, dataset: str, trained_split: str | None) -> str:
    """Return the command that tests a new head: on its data set, else on another one.

    `trained_split` is the split that it was trained on.
    """
    workspace, card = Workspace(run_dir.parent.parent), read_card(run_dir)
    if card is None:
        return command("inspect", run_dir)
    found = _evaluation(workspace, dataset, card, None, avoided=trained_split)
    if found is not None:
        return found
    packed, _ = _packed(workspace, dataset)
    for split in ("val", "test"):
        if split in packed and split != trained_split:
            making = extraction_for(dataset, card.origin)
            own = (workspace.packed_splits(dataset) or {}).get(split, False)
            return replace(making, split=split if own else None).command(workspace.root)
    for other in workspace.extracted_datasets():
        found = None if other == dataset else _evaluation(workspace, other, card, None)
        if found is not None:
            return found
    return command("inspect", run_dir)


def after_finetuning(
    run_dir: Path, dataset: str, eval_split: str | None, sentences: str | None = None
) -> dict[str, str]:
    """Return the commands after `finetune`, by name: `next` extracts with the tuned tower.

    `then`, if a split was evaluated, tests head and tower on the store of `next`, as the protocol
    does that its training videos belong to (few-shot, base to novel). For a head that looks at
    pixels, `next` is the evaluation, which makes the features itself. `sentences` is the
    prompt set or the file that the training was given.
    """
    workspace, card = Workspace(run_dir.parent.parent), read_card(run_dir)
    if card is None:
        return {"next": command("inspect", run_dir)}
    if _looks_at_pixels(card):
        return {"next": _pixel_evaluation(workspace, card, eval_split)}
    own = (workspace.packed_splits(dataset) or {}).get(eval_split or "", False)
    making = replace(extraction_for(dataset, card.origin), split=eval_split if own else None)
    own_words = sentences is not None and sentences.endswith(".json")
    if sentences is not None and not own_words:
        making = replace(making, prompts=sentences)
    described = {"descriptions": sentences} if own_words else {}
    steps = {"next": making.command(workspace.root, **described)}
    if eval_split is not None:
        splits, names = _packed(workspace, dataset)
        kind, compared = _protocol_of(run_dir, card, len(names))
        usual = _default_test(splits)
        if kind in ("fewshot", "base-to-novel") and "test1" in splits:
            usual = "test1"
        split = None if eval_split == usual and kind != "zeroshot" else eval_split
        steps["then"] = _eval_command(workspace, dataset, card, kind, split, None, compared)
    return steps


def _protocol_of(run_dir: Path, card: HeadCard, n_classes: int) -> tuple[str, int]:
    """Return the protocol that a fine-tuned run belongs to, and the fewest classes it compares.

    `n_classes` are those of the whole data set.
    """
    settings = read_config(run_dir) or {}
    data = settings.get("data", {})
    half, drawn = data.get("half", "all"), data.get("shots") is not None
    drawn = drawn and settings.get("training", {}).get("save") != "best"  # reports the last epoch
    novel = max(n_classes - card.n_classes, 0)
    if half == "all":
        return "fewshot" if drawn else "closeset", card.n_classes
    if half == "base" and drawn:
        return "base-to-novel", min(card.n_classes, novel)
    return "zeroshot", n_classes


def after_descriptions(
    root: Path, dataset: str | None, file: Path, encoder: str | None = None
) -> dict[str, str]:
    """Return `next`, the training with a file of class descriptions of a data set, if it is known.

    `encoder` is the CLIP whose text tower the file was checked with; None: the one that the
    workspace begins with.
    """
    if dataset is None:
        return {}
    likely = encoder or first_extraction(Workspace(root), dataset).encoder or DEFAULT_ENCODER
    encoder = None if likely.startswith((DEFAULT_ENCODER, ADAPTED_BY)) else likely
    guided = next(name for name in method_names() if method(name).adapts)
    named = {"dataset": dataset, "encoder": encoder, "method": guided}
    return {"next": command("finetune", **named, guides=file, root=root)}


def after_import(workspace: Workspace, run: str) -> str:
    """Return the command after `import-checkpoint`: the extraction for a packed data set.

    For a head that looks at pixels, it is the evaluation, which makes the features itself.
    """
    card = read_card(workspace.run_dir(run))
    packed = _labelled(workspace)
    if card is None or not packed:
        return more_videos(workspace)
    if _looks_at_pixels(card):
        return _pixel_evaluation(workspace, card)
    dataset = next(filter(_is_zeroshot_set, packed), packed[0])
    splits, names = _packed(workspace, dataset)
    same = set(card.origin.class_names or ()) == set(names)
    protocol = None if same else usual_protocol("zeroshot", dataset, split_names=splits)
    return extraction_for(dataset, card.origin, protocol=protocol).command(workspace.root)


def _pixel_evaluation(
    workspace: Workspace,
    card: HeadCard,
    tested: str | None = None,
    datasets: Sequence[str] | None = None,
) -> str:
    """Return the `eval` command, or the way to one, for a head that looks at pixels.

    `tested` is the split of its own data set that was evaluated in training. `datasets` are those
    to choose from otherwise; None: all with labels.
    """
    own = card.origin.dataset
    if tested is not None:
        usual = tested == _default_test(_packed(workspace, own)[0])
        return _eval_command(workspace, own, card, "closeset", None if usual else tested)
    named = _labelled(workspace) if datasets is None else datasets
    packed = [name for name in named if name != own]
    if not packed:
        return more_videos(workspace)
    dataset = next(filter(_is_zeroshot_set, packed), packed[0])
    _, names = _packed(workspace, dataset)
    same = set(card.origin.class_names or ()) == set(names)
    return _eval_command(workspace, dataset, card, "closeset" if same else "zeroshot", None)


def newest_evaluation(workspace: Workspace) -> str:
    """Return a command that gives the newest head a result, or that leads to a head."""
    card = newest_card(workspace)
    return workspace.first_command() if card is None else _any_evaluation(workspace, card)


def evaluation_of(run_dir: Path) -> str:
    """Return a command that gives the head in a run folder a result, or that makes it possible."""
    folder = (run_dir.parent if run_dir.name == FIRST_STAGE else run_dir).parent
    workspace, card = Workspace(folder.parent), read_card(run_dir)
    if folder.name != "heads":
        return command("eval", "--zeroshot", "NAME", head=run_dir.name)
    if card is None and run_dir.name != MEAN_OF_FRAMES:
        return workspace.first_command()
    return _any_evaluation(workspace, card)


def _looks_at_pixels(card: HeadCard) -> bool:
    return method(card.config.kind).pixels


def _any_evaluation(workspace: Workspace, card: HeadCard | None) -> str:
    own = "" if card is None else card.origin.dataset
    if card is not None and _looks_at_pixels(card):
        known, _ = _packed(workspace, own)
        return _pixel_evaluation(workspace, card, _default_test(known))
    for dataset in sorted(workspace.extracted_datasets(), key=lambda name: name != own):
        found = _evaluation(workspace, dataset, card, None)
        if found is not None:
            return found
    for dataset in _labelled(workspace):
        making = first_extraction(workspace, dataset)
        if card is not None and _is_there(workspace, card.origin.encoder):
            making = extraction_for(dataset, card.origin)
        if not (workspace.features_dir(dataset) / making.file_name).exists():
            return making.command(workspace.root)
    return more_videos(workspace) if workspace.extracted_datasets() else workspace.first_command()


def more_videos(workspace: Workspace) -> str:
    """Return the command, with capitals to fill in, that brings in videos to test a head on."""
    return command("pack", dataset="NAME", videos="DIR", root=workspace.root)


def _training(workspace: Workspace, dataset: str, split: str, store: Path, several: bool) -> str:
    """Write the `train-head` command; it names the run if its usual name may be taken."""
    taken = {path.name for path in (workspace.root / "heads").glob(f"{dataset}-*")}
    free = (f"{dataset}-{number}" for number in range(2, len(taken) + 3))
    return command(
        "train-head",
        dataset=dataset,
        split=split,
        store=store.stem if several else None,
        name=next(name for name in free if name not in taken) if taken else None,
        root=workspace.root,
    )


def _tells_apart(path: Path, split: str) -> bool:
    """Return whether the videos of a store to train on, of `split` or the usual ones, differ."""
    try:
        store = Store(path)
        usual = "train" if "train" in store.split_names else ""
        rows = store.split(split or usual) if split or usual else store.rows
        at = store.positions(rows)
        usable = at[store.status[at] == STATUS_OK].tolist()
        if store.multi_label:
            return len({frozenset(span.label for span in store.spans[i]) for i in usable}) > 1
        return len(set(store.labels[usable].tolist())) > 1
    except (UserError, WorkError):
        return False


@dataclass(frozen=True)
class _Held:
    """A store of embeddings, and the splits that it has rows of."""

    path: Path
    metadata: StoreMetadata
    splits: list[str]


def _evaluation(
    workspace: Workspace,
    dataset: str,
    card: HeadCard | None,
    store: Path | None,
    *,
    avoided: str | None = None,
) -> str | None:
    """Return the `eval` command for a data set; None if no store of it can be tested.

    `card` None means CLIP's mean of frames. `store` is taken if several stores fit. `avoided` is a
    split that the head was trained on.
    """

    def fits(made: Provenance) -> bool:
        if card is None:
            return not made.of_views
        return made.encoder_fingerprint == card.origin.encoder_fingerprint

    every = _stores(workspace, dataset)
    held = [e for e in every if e.metadata.class_names and fits(e.metadata.provenance)]
    if not held:
        return None
    names = held[0].metadata.class_names
    splits = {name for each in held for name in each.splits}
    numbered = sorted(name for name in splits if name.startswith("test"))
    own = (avoided or "").replace("train", "test")  # train2 goes with test2
    tests = [name for name in ("val", own, "test", *numbered) if name in splits - {avoided}]
    known = card is None or _knows(card, names)
    made_of = {dataset, *(each.metadata.provenance.dataset for each in held)}
    seen = card is not None and card.origin.dataset in made_of
    if known and tests:
        kind, split = "closeset", tests[0]
    elif seen and tests:  # a head of some of the classes
        kind, split = "zeroshot", tests[0]
    elif seen or (known_dataset(dataset) == "k600" and not tests):
        return None  # there are only videos that it was trained on, or none that count
    else:
        kind, split = "zeroshot", None
    fitting = [each for each in held if split is None or split in each.splits]
    named = None
    if len(fitting) > 1:  # the store at hand, else one like that of the head, else any
        alike = [e for e in fitting if card is not None and card.is_like(e.metadata.provenance)]
        at_hand = [e for e in fitting if store and e.path.absolute() == store.absolute()]
        named = (at_hand or alike or fitting)[0].path.stem
    if kind == "closeset" and split == _default_test({n for each in every for n in each.splits}):
        split = None
    return _eval_command(workspace, dataset, card, kind, split, named, len(names))


def _eval_command(
    workspace: Workspace,
    dataset: str,
    card: HeadCard | None,
    kind: str,
    split: str | None,
    store: str | None = None,
    n_classes: int | None = None,
) -> str:
    few = card is not None and card.cannot_modulate(n_classes or card.n_classes)
    words = [f"--{kind}", dataset]
    if kind == "zeroshot" and split is None and known_dataset(dataset) == "k600":
        named = card is not None and card.origin.class_names is not None
        if not named and "k400" not in workspace.packed_datasets():  # which classes are new?
            words = ["--protocol", "zeroshot", "--dataset", dataset]
    return command(
        "eval",
        *words,
        head=MEAN_OF_FRAMES if card is None else card.name,
        split=split,
        store=store,
        no_modulate=few,
        root=workspace.root,
    )


def _default_test(splits: Collection[str]) -> str | None:
    """Return the split that a close-set evaluation tests by itself."""
    return next((name for name in ("val", "test") if name in splits), None)


def _knows(card: HeadCard, names: Sequence[str]) -> bool:
    """Return whether a head was trained on the classes `names`; by their number if it has none."""
    known = card.origin.class_names
    return card.n_classes == len(names) if known is None else set(known) == set(names)


def _stores(workspace: Workspace, dataset: str) -> list[_Held]:
    held = []
    for path in workspace.stores(dataset):
        try:
            metadata = read_metadata(path)
        except (UserError, WorkError):
            continue
        if metadata.schema.pooled:
            held.append(_Held(path, metadata, _held_splits(metadata)))
    return held


def _newest_stores(workspace: Workspace) -> list[tuple[Path, StoreMetadata]]:
    found = [
        (each.path, each.metadata)
        for dataset in workspace.extracted_datasets()
        for each in _stores(workspace, dataset)
    ]
    return sorted(found, key=lambda each: (each[0] / "zarr.json").stat().st_mtime_ns, reverse=True)


def _held_splits(metadata: StoreMetadata) -> list[str]:
    """Return the splits that a store may have rows of."""
    only = metadata.provenance.split
    return [only] if only else list(metadata.split_names)


def _packed(workspace: Workspace, dataset: str) -> tuple[list[str], list[str]]:
    """Return the splits and the class names of a packed data set; empty if they cannot be read."""
    try:
        packed = found_object(workspace.dataset_dir(dataset) / DATASET_FILE, LISTS_LIMIT) or {}
        return [*map(str, packed["split_names"])], [*map(str, packed["class_names"])]
    except (LookupError, TypeError):
        return [], []


def _labelled(workspace: Workspace) -> list[str]:
    """Return the packed data sets whose videos have classes, the newest first."""
    return [name for name in workspace.packed_datasets() if not workspace.unlabelled(name)]


def _is_zeroshot_set(dataset: str) -> bool:
    """Return whether publications test heads of other data sets on this one."""
    return any(
        protocol.kind == "zeroshot" and protocol.dataset == known_dataset(dataset)
        for protocol in PROTOCOLS.values()
    )


def _is_there(workspace: Workspace, encoder: str) -> bool:
    """Return whether an encoder is still where it was; a name of open_clip's always is."""
    if encoder.startswith(ADAPTED_BY):
        return read_card(workspace.run_dir(encoder.removeprefix(ADAPTED_BY))) is not None
    if os.path.isabs(encoder):
        return Path(encoder).exists()
    return "/" in encoder or (workspace.root / "encoders" / encoder).is_dir()
