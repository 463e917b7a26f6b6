"""Carries out an extraction plan, with the encoder and decoder that it needs.

The process that runs `mote-cli extract` makes one job, and so does every worker of a cluster.
"""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from contextlib import closing
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

from featstore import ClassText, Provenance, StoreWriter
from featstore.commands import command
from featstore.errors import UserError
from featstore.format.metadata import StoreMetadata, TarEntry
from featstore.format.tiers import FRAMES
from featstore.opening import AnyWriter, new_writer, writer_of
from featstore.progress import ProgressSink, no_progress
from featstore.reading.repair import repair_command
from featstore.writing.writer import StoreExists
from pipeline.clip_encoder import Encoder, load_encoder
from pipeline.decoding.contract import Decoder
from pipeline.decoding.nvdec.graphs import DECODER_NAME, dali_version
from pipeline.encoders.specs import lasting_spec, remember_fingerprint
from pipeline.extraction.cpu_pool import VideoPool, decoder_for, open_pool
from pipeline.extraction.engine import Engine
from pipeline.extraction.plan import ExtractionPlan
from pipeline.extraction.request import Totals
from pipeline.extraction.tiers import frame_output
from pipeline.prompts import PromptSet


class ExtractionJob:
    """Does the work of a plan. Call `close` after use."""

    def __init__(
        self, plan: ExtractionPlan, encoder: Encoder | None = None, decoder: Decoder | None = None
    ) -> None:
        """Load the encoder, and compare the plan with the store if that exists already.

        `encoder` and `decoder` replace the ones that the request names. Raises UserError if the
        store was made in another way, and whatever `load_encoder` raises.
        """
        begun = plan.writer.provenance if plan.writer is not None else None
        if decoder is None:
            name = decoder_for(plan.request, begun.decoder if begun else None)
        else:
            name = decoder.name
        self.plan = plan
        self.encoder = encoder or _request_encoder(plan)
        self.encoder.preprocessing.require_crops(plan.request.crops)
        self._decoder = decoder
        self._output = frame_output(plan.request.tier, self.encoder)
        clip_frames = self._output.clip_frames
        if clip_frames > 1:
            self.encoder.require_clips(plan.request.sampling.frames)
        self.schema = plan.schema(self.encoder.dim, self._output.item, clip_frames)
        self.provenance = _provenance(plan, self.encoder, name, clip_frames)
        if plan.writer is not None:
            self._require_same(plan.writer)

    def begin(self) -> AnyWriter:
        """Return the writer of the store, and make the store if it does not exist.

        Raises UserError if another process has just made the store in another way, `WorkError` if
        the disk is too small for the store.
        """
        request = self.plan.request
        writer = self.plan.writer
        if writer is None:
            self.plan.require_room(self.plan.mine, self.schema)
            try:
                writer = self._new_store()
            except StoreExists:
                writer = writer_of(request.store_path)
                assert writer is not None
                self._require_same(writer)
        remember_fingerprint(
            request.store_path, request.encoder, request.encoders_dir, self.encoder.fingerprint
        )
        return writer

    @cached_property
    def pool(self) -> VideoPool:
        """The pool of this job, which is opened on first use."""
        request = self.plan.request
        return open_pool(
            *(self.provenance.decoder, self.encoder, request.sampling, self._output),
            crops=request.crops,
            workers=request.workers,
            strict=request.strict,
            decoder=self._decoder,
        )

    def run(
        self, writer: AnyWriter, numbers: Sequence[int], progress: ProgressSink = no_progress
    ) -> Totals:
        """Do the partitions `numbers`, which the caller has claimed. Raises as `Engine.run`."""
        plan = self.plan
        if isinstance(writer, StoreWriter) and not plan.request.retry_failed:
            # Another process may have done some partitions before they were claimed. In a remote
            # store nothing can be claimed, so looking once more would not help.
            numbers = [number for number in numbers if not writer.done(number)]
        if not numbers:
            return Totals()
        with closing(plan.tar_source()) as source:
            engine = Engine(plan.dataset, plan.tars, writer, self.pool, source, progress)
            return engine.run(numbers)

    def close(self) -> None:
        """Close the pool if it was opened."""
        if "pool" in self.__dict__:
            self.pool.close()

    def _require_same(self, writer: AnyWriter) -> None:
        """Raise UserError that lists the differences if the store was made in another way."""
        plan = self.plan
        differences = writer.provenance.differences(self.provenance)
        store = plan.request.store_path
        local = not isinstance(store, str)  # the store commands take folders, no URLs
        encoders = plan.request.encoders_dir
        root = None if encoders is None else encoders.parent
        held = set(writer.prompt_sets)
        missing = [prompts for prompts in plan.prompt_sets if prompts.name not in held]
        if missing and not differences and local:
            words = shlex.split(missing[0].option)
            raise UserError(
                f"{store} has no class texts of prompt set {missing[0].name!r}: run "
                f"`{command('store', 'add-texts', store, *words, root=root)}`, which touches no "
                "features"
            )
        if missing:
            lacking = ", ".join(sorted(prompts.name for prompts in missing))
            differences.append(f"prompt sets: store lacks {lacking}")
        plan.require_same_sentences(writer)
        if differences:
            remedy = "use the settings it was made with"
            if isinstance(store, Path):
                remedy += f" (`{repair_command(store, writer.metadata, root)}`)"
            remedy += ", or remove it to extract again"
            if local and all(phrase.startswith("dataset_fingerprint") for phrase in differences):
                more = command("store", "add-tars", store, dataset=plan.dataset.name, root=root)
                remedy = (
                    f"if the data set only has more tars now, `{more}` adds them; else remove it "
                    "to extract again"
                )
            raise UserError(
                f"{store} was made in another way, and features are never mixed "
                f"({'; '.join(differences)}): {remedy}"
            )

    def _new_store(self) -> AnyWriter:
        plan, dataset = self.plan, self.plan.dataset
        metadata = StoreMetadata(
            self.schema,
            self.provenance,
            tuple(TarEntry(tar.file, tar.rows, tar.bytes, tar.sha256) for tar in plan.tars),
            *(dataset.class_names, dataset.raw_class_names, dataset.split_names),
        )
        class_texts = {
            prompts.name: class_text(self.encoder, dataset.class_names, prompts)
            for prompts in plan.prompt_sets
        }
        return new_writer(plan.request.store_path, metadata, class_texts)


def code_versions() -> dict[str, str]:
    """Return the versions of the packages that make features from videos, by package name."""
    names = ("mote-video", "torch", "open_clip_torch", "av", "pillow")
    return {name: version(name) for name in names}


def class_text(encoder: Encoder, names: tuple[str, ...], prompts: PromptSet) -> ClassText:
    """Encode the class texts of a prompt set, in the form that a store holds."""
    return ClassText(
        names,
        encoder.class_embeddings(names, prompts).cpu().numpy(),
        prompts.hash(names),
        templates=prompts.templates,
        encoder_fingerprint=encoder.fingerprint,
        rephrased=prompts.rephrased,
    )


def _request_encoder(plan: ExtractionPlan) -> Encoder:
    """Load the encoder of a request, in the precision of the store if that exists already."""
    request = plan.request
    precision = request.precision
    if precision == "auto" and plan.writer is not None:
        # "auto" chooses by timing; a store that was begun keeps the precision chosen then.
        precision = plan.writer.provenance.precision
    elif precision == "auto" and request.tier.kind == FRAMES:
        precision = "fp32"  # nothing is encoded: no need to time the tower
    return load_encoder(
        request.encoder, precision, request.device, encoders_dir=request.encoders_dir
    )


def _provenance(
    plan: ExtractionPlan, encoder: Encoder, decoder_name: str, clip_frames: int
) -> Provenance:
    """Describe how the features are made, for the store to record."""
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
        clip_frames=clip_frames,
    )
