"""Whether a head, a store and its class texts belong together.

C = classes, D = embedding width.
"""

from __future__ import annotations

import logging

import torch
from torch.nn import functional

from featstore.errors import UserError, WorkError
from featstore.format.class_texts import DEFAULT_PROMPTS, ClassText
from featstore.reading.store import Store
from heads.methods.head import Head, build_head
from heads.methods.registry import MEAN_OF_FRAMES, method
from heads.methods.settings import HeadOrigin
from heads.methods.text_classifier import SAME_CLASS, class_cosines

log = logging.getLogger(__name__)


def require_fits(store: Store, head: Head, prompt_set: str | None) -> tuple[str, ClassText]:
    """The prompt set (default: the head's, else the store's only one) and its texts to test with.

    UserError when head, store and texts do not belong together or the store holds no embeddings,
    WorkError when it is not complete.
    """
    check_complete(store)
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
            f"the head takes embeddings of width {head.config.dim} and {store.path.name} holds "
            f"{provenance.dim} ({provenance.encoder}): extract with the head's encoder"
        )
    if head.origin is not None:
        check_encoder(head.origin, provenance.encoder, provenance.encoder_fingerprint)


def check_encoder(origin: HeadOrigin, encoder: str, fingerprint: str) -> None:
    """Raise UserError when features of `encoder` are not those the head was trained on."""
    if origin.encoder_fingerprint != fingerprint:
        raise UserError(
            f"the head was trained on features of {origin.encoder} (weights "
            f"{origin.encoder_fingerprint[:12]}), these come from {encoder} (weights "
            f"{fingerprint[:12]}): use the head's encoder"
        )


def mean_head(dim: int, logit_scale: float = 100.0) -> Head:
    """The head without parameters: a video is the mean of its frames, as CLIP would have it."""
    return build_head(
        method(MEAN_OF_FRAMES).config(kind=MEAN_OF_FRAMES, dim=dim), logit_scale=logit_scale
    )


def check_complete(store: Store) -> None:
    """Raise unless `store` holds embeddings (UserError) of every listed sample (WorkError)."""
    store.require_embeddings()
    if not store.complete:
        raise WorkError(f"{store.path} is not complete: finish it with mote-cli extract first")


def check_class_text(head: Head, text: ClassText, prompt_set: str) -> None:
    """Raise UserError when class texts differ from those the head was trained with.

    Told by the classes both know: the same name under the same prompt set must have the same
    embedding, or other sentences or another text tower made it; and by the templates, where both
    say them. Another prompt set is noted.
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
            "...) than the one of that name the head was trained with "
            f"({origin.prompt_templates[0]!r}, ...): add the head's to the store under another "
            "name and choose it with --prompts"
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
            "sentences or another text tower made it; make the class texts again with the head's, "
            "or choose another set with --prompts"
        )


def knows_classes(head: Head, text: ClassText) -> bool:
    """Whether the tested classes are those the head was trained on, in whatever order.

    Told by their names; by their embeddings for a head that has only those.
    """
    if head.origin is None:
        return True
    if head.origin.class_names is not None:
        return set(head.origin.class_names) == set(text.names)
    trained = head.training_class_embeddings.cpu()
    if trained.shape != text.embeddings.shape:
        return False
    tested = functional.normalize(torch.from_numpy(text.embeddings), dim=-1)
    best, place = class_cosines(tested, trained).max(1)
    return bool((best >= SAME_CLASS).all()) and len(set(place.tolist())) == len(place)


def default_prompt_set(store: Store, head: Head) -> str:
    """The head's prompt set, else the store's only one; UserError where it has several."""
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
    """The prompt set to train with where none is named: that of the head the training starts from,
    else the usual one, else the store's only one.

    UserError where the store has several others.
    """
    if initial is not None and initial.origin is not None:
        return initial.origin.prompt_set
    if DEFAULT_PROMPTS in store.prompt_sets:
        return DEFAULT_PROMPTS
    return default_prompt_set(store, mean_head(store.provenance.dim))
