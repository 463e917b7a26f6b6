"""The store of an extraction: with which encoder it is made, what it records, what it refuses.

Both the process that plans an extraction and the workers of a cluster hold what they have against
the store here.
"""

from __future__ import annotations

import platform
import shlex
from importlib.metadata import version
from typing import TYPE_CHECKING

from featstore import ClassText, Provenance, StoreSchema
from featstore.errors import UserError
from featstore.format.tiers import FRAMES
from featstore.opening import AnyWriter, writer_maker, writer_of
from featstore.writing.writer import StoreExists
from pipeline.encoders.specs import lasting_spec, remember_fingerprint, signature
from pipeline.extraction.plan import ExtractionPlan, fingerprint_note
from pipeline.prompts import PromptSet

if TYPE_CHECKING:  # an encoder brings torch along, and a finished store needs none
    from pipeline.clip_encoder import Encoder


def load_request_encoder(plan: ExtractionPlan) -> Encoder:
    """The encoder of a request, in the precision of the store where one was begun.

    Raises UserError and `WorkError` as `load_encoder`.
    """
    from pipeline.clip_encoder import load_encoder

    request = plan.request
    precision = request.precision
    if precision == "auto" and plan.writer is not None:
        # The choice is made by timing; a store once begun stays with it.
        precision = plan.writer.provenance.precision
    elif precision == "auto" and request.tier.kind == FRAMES:
        precision = "fp32"  # nothing is encoded: no need to time the tower
    return load_encoder(
        request.encoder, precision, request.device, encoders_dir=request.encoders_dir
    )


def open_or_init(
    plan: ExtractionPlan, encoder: Encoder, decoder_name: str, schema: StoreSchema
) -> AnyWriter:
    """The writer of the request's store, which is made when it is not there.

    Raises UserError when the store was made in another way.
    """
    request = plan.request
    path = request.store_path
    provenance = provenance_of(plan, encoder, decoder_name)
    if plan.writer is None:
        plan.require_room(plan.mine, schema)
        try:
            plan.writer = _init(plan, encoder, provenance, schema)
        except StoreExists:  # another process made it at this moment
            plan.writer = writer_of(path)
            assert plan.writer is not None
    require_same(plan, plan.writer, provenance)
    remember_fingerprint(
        fingerprint_note(path),
        signature(request.encoder, request.encoders_dir),
        encoder.fingerprint,
    )
    return plan.writer


def require_same(plan: ExtractionPlan, writer: AnyWriter, provenance: Provenance) -> None:
    """Raise UserError with the differences when the store was made in another way."""
    differences = writer.provenance.differences(provenance)
    store = plan.request.store_path
    place = shlex.quote(str(store))
    local = not isinstance(store, str)  # the store commands take folders, no URLs
    held = set(writer.prompt_sets)
    missing = [prompts for prompts in plan.prompt_sets if prompts.name not in held]
    if missing and not differences and local:
        raise UserError(
            f"{store} has no class texts of prompt set {missing[0].name!r}: run `mote-cli store "
            f"add-texts {place} {missing[0].option}`, which touches no features"
        )
    if missing:
        lacking = ", ".join(sorted(prompts.name for prompts in missing))
        differences.append(f"prompt sets: store lacks {lacking}")
    plan.require_same_sentences()
    if differences:
        remedy = "ask for what it holds, or remove it to extract anew"
        if local and all(phrase.startswith("dataset_fingerprint") for phrase in differences):
            remedy = (
                f"if the data set only has more tars now, `mote-cli store add-tars {place} "
                f"--dataset {plan.dataset.name}` adds them; else remove it to extract anew"
            )
        raise UserError(
            f"{store} was made in another way and is never mixed "
            f"({'; '.join(differences)}): {remedy}"
        )


def provenance_of(plan: ExtractionPlan, encoder: Encoder, decoder_name: str) -> Provenance:
    """What the store will record of how its features were made."""
    from pipeline.decoding.nvdec.graphs import DECODER_NAME, dali_version

    request = plan.request
    return Provenance(
        encoder=lasting_spec(request.encoder, request.encoders_dir),
        encoder_fingerprint=encoder.fingerprint,
        dim=encoder.dim,
        logit_scale=encoder.logit_scale,
        precision=encoder.precision,
        sampling=request.sampling.text,
        crops=request.crops,
        preprocessing=encoder.preprocessing.to_json(),
        decoder=decoder_name,
        strict_decode=request.strict,
        versions={
            "python": platform.python_version(),
            **code_versions(),
            **(dali_version() if decoder_name == DECODER_NAME else {}),
        },
        dataset=plan.dataset.name,
        dataset_fingerprint=plan.dataset.fingerprint,
        tier=request.tier.text,
        label_map=plan.dataset.label_map,
        split=plan.recorded_split,
    )


def code_versions() -> dict[str, str]:
    """Versions of what makes features out of videos."""
    names = ("mote-video", "torch", "open_clip_torch", "av", "pillow")
    return {name: version(name) for name in names}


def _init(
    plan: ExtractionPlan, encoder: Encoder, provenance: Provenance, schema: StoreSchema
) -> AnyWriter:
    dataset = plan.dataset
    return writer_maker(plan.request.store_path)(
        schema,
        provenance,
        tars=[
            {"file": shard.file, "rows": shard.rows, "bytes": shard.bytes, "sha256": shard.sha256}
            for shard in plan.shards
        ],
        class_names=dataset.class_names,
        raw_class_names=dataset.raw_class_names,
        split_names=dataset.split_names,
        class_texts={
            prompts.name: class_text(encoder, dataset.class_names, prompts)
            for prompts in plan.prompt_sets
        },
    )


def class_text(encoder: Encoder, names: tuple[str, ...], prompts: PromptSet) -> ClassText:
    """Class texts of a prompt set as a store holds them."""
    return ClassText(
        names,
        encoder.class_embeddings(names, prompts).cpu().numpy(),
        prompts.hash(names),
        templates=prompts.templates,
        encoder_fingerprint=encoder.fingerprint,
    )
