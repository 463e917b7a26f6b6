"""What the head files of a workspace say about themselves, read without torch and without weights.

Messages take encoder, sampling, prompt set and data set of the next command from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from featstore.errors import UserError, WorkError
from featstore.files.documents import parse_json
from featstore.format.provenance import Provenance
from featstore.opened_stores import Likely
from featstore.workspace import FIRST_STAGE, HEAD_FILE, Workspace
from heads.methods.registry import config_from_json, method
from heads.methods.settings import HeadOrigin, MethodConfig


@dataclass(frozen=True)
class HeadCard:
    """The name, configuration and origin of a finished head."""

    name: str
    config: MethodConfig
    origin: HeadOrigin
    n_classes: int
    """Number of classes that the head was trained on."""

    def cannot_modulate(self, n_tested: int) -> bool:
        """Return whether modulation is on and compares more classes than there are."""
        on = method(self.config.kind).modulated and self.config.modulates
        return on and min(n_tested, self.n_classes) < self.config.modulation_neighbours

    def is_like(self, made: Provenance) -> bool:
        """Return whether features were sampled and cropped as those the head was trained on."""
        return (made.sampling, made.crops) == (self.origin.sampling, self.origin.crops)

    def likely_stores(self) -> tuple[Likely, ...]:
        """Return `likely_stores` of the newest head, which this one is."""
        return likely_stores(self.origin, f"the newest head, {self.name}, was trained")


def likely_stores(origin: HeadOrigin, words: str) -> tuple[Likely, ...]:
    """Return why a store is probably meant that is like the one a head was trained on.

    `words` go on "as": "the head was trained".
    """
    made = (origin.sampling, origin.crops)
    return (
        (
            f"with the encoder that {words} with",
            lambda store: store.provenance.encoder_fingerprint == origin.encoder_fingerprint,
        ),
        (f"with as many frames as {words} on", lambda store: store.schema.frames == origin.frames),
        (
            f"sampled as {words}",
            lambda store: (store.provenance.sampling, store.provenance.crops) == made,
        ),
    )


def read_card(run_dir: Path) -> HeadCard | None:
    """Read the card of the head in a run folder; None if there is none that can be read."""
    try:
        with safe_open(run_dir / HEAD_FILE, framework="np") as file:
            card: dict[str, Any] = parse_json((file.metadata() or {})["mote"])
            names, table = set(file.keys()), "training_class_embeddings"
            held = file.get_slice(table).get_shape()[0] if table in names else None
        origin = HeadOrigin.from_json(card["origin"])
        n_classes = len(origin.class_names or ()) if held is None else int(held)
        name = run_dir.name
        name = f"{run_dir.parent.name}/{name}" if name == FIRST_STAGE else name
        return HeadCard(name, config_from_json(card["head"]), origin, n_classes)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    except (SafetensorError, UserError):
        return None


def adapting_card(workspace: Workspace, run: str) -> HeadCard:
    """Return the card of a head that adapts both towers of an encoder.

    Raises UserError for another head, WorkError for one whose file cannot be read.
    """
    run_dir = workspace.choose_run(run)
    card = read_card(run_dir)
    if card is None:
        raise WorkError(
            f"{run_dir / HEAD_FILE} is damaged, or does not say what it was made for: copy it "
            "again or train again"
        )
    if not method(card.config.kind).adapts:
        raise UserError(
            f"{run} is no head that adapts the towers of its encoder, which takes what "
            f"{card.origin.encoder} makes: leave --head out"
        )
    return card


def kind_of(run_dir: Path) -> str | None:
    """Return the method of the head in a run folder, or of its first stage; None without a head."""
    card = read_card(run_dir) or read_card(run_dir / FIRST_STAGE)
    return None if card is None else card.config.kind


def cards(workspace: Workspace) -> list[HeadCard]:
    """Return the cards of the heads that were not trained by an evaluation, newest first."""
    found = map(read_card, workspace.own_runs())
    return [card for card in found if card is not None]


def newest_card(workspace: Workspace) -> HeadCard | None:
    """Return the first of `cards`, without reading the others."""
    found = map(read_card, workspace.own_runs())
    return next((card for card in found if card is not None), None)
