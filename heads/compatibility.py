"""Checks whether a head, a store and its class texts belong together.

C = classes, D = embedding width.
"""

from __future__ import annotations

import logging

import torch
from torch.nn import functional

from featstore.errors import UserError, WorkError
from featstore.format.class_texts import DEFAULT_PROMPTS, ClassText
from featstore.format.metadata import read_metadata
from featstore.reading.repair import repair_command
from featstore.reading.store import Store
from featstore.spelling import comparable
from heads.methods.head import Head, build_head
from heads.methods.registry import MEAN_OF_FRAMES, method
from heads.methods.settings import HeadOrigin
from heads.methods.text_classifier import SAME_CLASS, class_cosines

log = logging.getLogger(__name__)


def require_fits(store: Store, head: Head, prompt_set: str | None) -> tuple[str, ClassText]:
    """Return the prompt set to test with, and its class texts.

    The default is the head's prompt set, else the store's only one. Raises UserError when head,
    store and texts do not belong together or the store holds no embeddings, and WorkError when the
    store is not complete.
    """
    check_complete(store, of_views=head.of_views)
    check_fits(head, store)
    chosen = prompt_set or default_prompt_set(store, head)
    text = store.class_text(chosen)
    check_class_text(head, text, chosen)
    return chosen, text


def check_fits(head: Head, store: Store) -> None:
    """Raise UserError when `head` was trained on features of another encoder than the store's."""
    provenance = store.provenance
    if head.config.dim != provenance.dim:
        raise UserError(
            f"the head takes embeddings of width {head.config.dim}, but {store.path.name} holds "
            f"width {provenance.dim} ({provenance.encoder}): extract with the head's encoder"
        )
    if head.of_views and not provenance.of_views:
        raise UserError(
            f"{store.path.name} holds embeddings of frames, and the head "
            f"({method(head.config.kind).title}) looks at pixels: evaluate it without --store, "
            "which makes what it needs from the videos"
        )
    if head.origin is not None:
        check_encoder(head.origin, provenance.encoder, provenance.encoder_fingerprint)


def check_encoder(origin: HeadOrigin, encoder: str, fingerprint: str) -> None:
    """Raise UserError when the head was trained on features of an encoder other than `encoder`."""
    if origin.encoder_fingerprint != fingerprint:
        raise UserError(
            f"the head was trained on features of {origin.encoder} (weights "
            f"{origin.encoder_fingerprint[:12]}), but these features come from {encoder} (weights "
            f"{fingerprint[:12]}): use the head's encoder"
        )


def mean_head_of(store: Store) -> Head:
    """Return `mean_head` for a store: CLIP's mean of frames, whatever the store has of them."""
    made = store.provenance
    head = mean_head(made.dim, made.logit_scale)
    if not made.of_views:
        return head
    from heads.methods.dist.head import ClipOfViews  # few stores need it

    found = ClipOfViews(head.config, store.schema.frames)
    found.logit_scale.copy_(head.logit_scale)
    return found.eval()


def mean_head(dim: int, logit_scale: float = 100.0) -> Head:
    """Return the head without parameters, which averages the frames of a video as CLIP does."""
    return build_head(
        method(MEAN_OF_FRAMES).config(kind=MEAN_OF_FRAMES, dim=dim), logit_scale=logit_scale
    )


def check_complete(store: Store, *, of_views: bool = False) -> None:
    """Raise UserError if `store` holds no embeddings, WorkError if it is not complete.

    `of_views` as for `Store.require_embeddings`.
    """
    store.require_embeddings(of_views=of_views)
    if not store.complete:
        finish = repair_command(store.path, read_metadata(store.path))
        raise WorkError(f"{store.path} is not complete: finish it with `{finish}`")


def check_class_text(head: Head, text: ClassText, prompt_set: str) -> None:
    """Raise UserError when class texts differ from the texts that the head was trained with.

    Two things are compared: the embeddings of the classes that both know, since the same name in
    the same prompt set has another embedding only if other sentences or another text tower made it;
    and the templates, if both have them. Another prompt set only causes a warning.
    """
    origin = head.origin
    if origin is None:
        return
    if origin.prompt_set != prompt_set:
        log.warning(
            "the head was trained with prompt set %s and is tested with %s",
            *(origin.prompt_set, prompt_set),
        )
        return
    if origin.prompt_templates and text.templates not in ((), origin.prompt_templates):
        raise UserError(
            f"prompt set {prompt_set} of the store has other sentences ({text.templates[0]!r}, "
            "...) than the prompt set of the same name that the head was trained with "
            f"({origin.prompt_templates[0]!r}, ...): add the head's prompt set to the store under "
            "another name and choose it with --prompts"
        )
    trained = {name: at for at, name in enumerate(origin.class_names or ())}
    shared = [at for at, name in enumerate(text.names) if name in trained]
    if not shared or len(trained) != head.training_class_embeddings.shape[0]:
        return
    tested = functional.normalize(torch.from_numpy(text.embeddings[shared]), dim=-1)
    known = head.training_class_embeddings.cpu()[[trained[text.names[at]] for at in shared]]
    cosines = (tested * functional.normalize(known.float(), dim=-1)).sum(-1)
    worst = int(cosines.argmin())
    if cosines[worst] < SAME_CLASS:
        raise UserError(
            f"the class text of {text.names[shared[worst]]!r} in prompt set {prompt_set} is not "
            f"the one the head was trained with (cosine {float(cosines[worst]):.4f}): other "
            "sentences or another text tower made it; make the class texts again with the head's "
            "sentences and text tower, or choose another prompt set with --prompts"
        )


def knows_classes(head: Head, text: ClassText) -> bool:
    """Return whether the tested classes are those the head was trained on, in any order.

    Names are compared as a person reads them, or embeddings if the head has no class names.
    """
    if head.origin is None:
        return True
    if head.origin.class_names is not None:
        return set(map(comparable, head.origin.class_names)) == set(map(comparable, text.names))
    trained = head.training_class_embeddings.cpu()
    if not len(trained):  # an imported head whose file says nothing of its classes
        return True
    if trained.shape != text.embeddings.shape:
        return False
    tested = functional.normalize(torch.from_numpy(text.embeddings), dim=-1)
    best, place = class_cosines(tested, trained).max(1)
    return bool((best >= SAME_CLASS).all()) and len(set(place.tolist())) == len(place)


def default_prompt_set(store: Store, head: Head) -> str:
    """Return the head's prompt set, else the store's only one; UserError if it has several."""
    if head.origin is not None:
        return head.origin.prompt_set
    known = store.prompt_sets
    if len(known) != 1:
        raise UserError(
            f"{store.path.name} has class texts for {', '.join(known) or 'no prompt set'}: "
            "name one with --prompts"
        )
    return known[0]


def training_prompt_set(store: Store, initial: Head | None) -> str:
    """Return the prompt set to train with if the user names none.

    It is the prompt set of `initial`, the head that training starts from, else the usual one, else
    the store's only one. UserError if the store has several, but not the usual one.
    """
    if initial is not None and initial.origin is not None:
        return initial.origin.prompt_set
    if DEFAULT_PROMPTS in store.prompt_sets:
        return DEFAULT_PROMPTS
    return default_prompt_set(store, mean_head(store.provenance.dim))
