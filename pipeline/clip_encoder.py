"""Frozen CLIP towers, which turn frames and sentences into embeddings.

N images or clips, n sentences, C classes, D embedding width, s input size, L context length, T
frames of a clip.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import open_clip
import torch
import torch.nn.functional as F
from einops import rearrange

from featstore.errors import UserError, meant, one_line, quoted
from featstore.files.machine import cpu_has_bf16
from featstore.progress import ProgressSink, no_progress
from pipeline.encoders.fingerprint import fingerprint
from pipeline.encoders.sources import LoadedClip, load_clip
from pipeline.encoders.text_tower import mean_of_sentences, text_embeddings
from pipeline.preprocessing import FrameInput, Preprocessing
from pipeline.prompts import PromptSet, as_prompt_set

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

# "auto" chooses reduced precision only if it saves time and keeps the direction of embeddings.
MIN_SPEEDUP = 1.2
MIN_COSINE = 0.999
# A smaller tower is too quick to time reliably, and fp32 costs no time that anybody notices.
MIN_TIMED_PARAMETERS = 10_000_000
IMAGES_PER_BATCH = {"cpu": 16, "cuda": 256}  # bounds memory; on a CPU 8 to 32 are equally fast
SENTENCES_PER_BATCH = 256
NAMES_PER_BLOCK = 512  # of classes whose texts are compared with all others
NAMED = 5  # the most groups of classes with one text that a warning names


class Encoder:
    """A frozen CLIP. Threads may encode at the same time; no method changes its state.

    `name` can be a folder's name; `fingerprint` identifies weights and function, whatever they
    were loaded from; `logit_scale` is the multiplier (already exponentiated). An embedding is of
    `clip_frames` successive frames, which is 1 for all but ViCLIP; so many frames
    (`frames_together`) must be encoded in one call.
    """

    def __init__(self, loaded: LoadedClip, precision: str = "fp32", device: str = "cpu") -> None:
        self.name = loaded.name
        self.model_config = loaded.model_config
        self.fingerprint = fingerprint(loaded.model, loaded.model_config)
        self.device = torch.device(device)
        self.model = loaded.model.to(self.device)
        self.image_tower: torch.nn.Module = cast(torch.nn.Module, self.model.visual)
        self.clip_frames = self.frames_together = int(getattr(self.image_tower, "frames", 1))
        self.dim = int(loaded.model_config["embed_dim"])
        self.logit_scale = float(cast(torch.Tensor, self.model.logit_scale).float().exp())
        self.preprocessing = Preprocessing.from_open_clip(
            loaded.preprocess_config, size=cast(Any, self.image_tower).image_size
        )
        self._tokenizer = _tokenizer(loaded)
        self.context_length = int(self._tokenizer.context_length)
        self.precision: Precision = self._choose_precision(precision)
        # Weights in low precision, not autocast, which was three times slower than fp32 on a CPU.
        self.image_tower.to(PRECISIONS[self.precision])

    def encode_frames(self, frames: FrameInput) -> torch.Tensor:
        """Centre-crop and encode RGB uint8 [N,H,W,3] -> float32 [N,D] on the encoder's device.

        With frames of clips one after the other, N / T embeddings come out.
        """
        return self.encode_pixels(self.preprocessing.crops(frames, 1)[0])

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode preprocessed images [N,3,s,s] -> projected float32 [N,D], not normalised.

        With frames of clips one after the other, N / T embeddings come out.
        """
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, *self.preprocessing.size):
            raise ValueError(
                f"pixels must be [N,3,{self.preprocessing.size[0]},{self.preprocessing.size[1]}], "
                f"not {list(pixels.shape)}"
            )
        if self.clip_frames > 1:
            self.require_clips(len(pixels))
            return self.encode_clips(rearrange(pixels, "(n t) ... -> n t ...", t=self.clip_frames))
        return self._in_batches(pixels, 1)

    @torch.no_grad()
    def encode_clips(self, frames: torch.Tensor) -> torch.Tensor:
        """Encode preprocessed clips [N,T,3,s,s] -> float32 [N,D], not normalised.

        T is `clip_frames` (or 1, an image). Raises ValueError for another shape, and for an encoder
        of single frames.
        """
        side, lengths = self.preprocessing.size, (1, self.clip_frames)
        fits = frames.ndim == 5 and tuple(frames.shape[2:]) == (3, *side)
        if self.clip_frames == 1 or not fits or frames.shape[1] not in lengths:
            raise ValueError(
                f"{self.name} takes clips [N,{self.clip_frames},3,{side[0]},{side[1]}], not "
                f"{list(frames.shape)}"
                if self.clip_frames > 1
                else f"{self.name} encodes single frames: use encode_pixels"
            )
        return self._in_batches(frames, frames.shape[1])

    def require_clips(self, frames: int) -> None:
        """Raise UserError unless `frames` of a view are whole clips of this encoder."""
        if frames % self.clip_frames:
            raise UserError(
                f"{frames} frames are no whole clips: {self.name} takes {self.clip_frames} frames "
                f"at a time; ask for {self.clip_frames} or a multiple of it"
            )

    def _in_batches(self, pixels: torch.Tensor, frames: int) -> torch.Tensor:
        batch = IMAGES_PER_BATCH.get(self.device.type, IMAGES_PER_BATCH["cpu"])
        parts = [
            self._encode_batch(part, PRECISIONS[self.precision])
            for part in torch.split(pixels, max(1, batch // frames))
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def run_image_tower(self, pixels: torch.Tensor) -> None:
        """Send preprocessed images [N,3,s,s] through the tower, for hooks inside it."""
        self.image_tower(pixels.to(self.device, PRECISIONS[self.precision]))

    def _encode_batch(self, pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return image_embeddings(self.image_tower, pixels.to(self.device, dtype)).float()

    @property
    def token_room(self) -> int | None:
        """The most tokens of a sentence; None where the tokeniser cuts and cannot count."""
        simple = isinstance(self._tokenizer, open_clip.SimpleTokenizer)
        return self.context_length - 2 if simple else None  # start and end take one place each

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Return the tokens of each sentence, without start and end; only with a `token_room`."""
        return [len(self._tokenizer.encode(text)) for text in texts]

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """Return token ids int64 [n,L]. Raises UserError for a sentence the model cannot take."""
        room = self.token_room
        if room is not None:
            for text, length in zip(texts, self.token_counts(texts), strict=True):
                if length > room:
                    raise UserError(
                        f"the sentence {quoted(text, 80)} has {length} tokens, the encoder "
                        f"{self.name} takes {room}: shorten it"
                    )
        tokens = cast(torch.Tensor, self._tokenizer(list(texts)))
        vocabulary = cast(int | None, getattr(self.model, "vocab_size", None))
        if vocabulary is not None and int(tokens.max()) >= vocabulary:
            worst = texts[int(tokens.amax(dim=1).argmax())]
            raise UserError(
                f"the sentence {quoted(worst, 80)} has tokens beyond the {vocabulary} of the "
                f"encoder {self.name}: its vocabulary was cut down, use a whole CLIP"
            )
        return tokens

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        """Encode sentences -> float32 [n,D], not normalised; always computed in fp32.

        Raises UserError for an over-long sentence or one with tokens the model does not have.
        """
        if not texts:
            return torch.zeros(0, self.dim, device=self.device)
        return self.encode_tokens(self.tokenize(texts))

    @torch.no_grad()
    def encode_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Encode token ids int64 [n,L] -> float32 [n,D], not normalised; L is at most the tower's.

        An embedding is read at a sentence's largest id, the end of the text. A tower in float64
        gives float64. Raises ValueError for another shape or type, and for ids that the model
        lacks.
        """
        self._check_tokens(tokens)
        if not len(tokens):
            return torch.zeros(0, self.dim, device=self.device)
        return torch.cat(
            [
                text_embeddings(self.model, part)
                for part in torch.split(tokens.to(self.device), SENTENCES_PER_BATCH)
            ]
        )

    def _check_tokens(self, tokens: torch.Tensor) -> None:
        fits = tokens.ndim == 2 and 1 <= tokens.shape[1] <= self.context_length
        if not fits or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ValueError(
                f"token ids must be whole numbers [n, 1 to {self.context_length}], not "
                f"{tokens.dtype} {list(tokens.shape)}"
            )
        vocabulary = cast(int | None, getattr(self.model, "vocab_size", None))
        if vocabulary is not None and len(tokens):
            lowest, highest = (int(v) for v in tokens.aminmax())
            if lowest < 0 or highest >= vocabulary:
                raise ValueError(
                    f"token id {lowest if lowest < 0 else highest} is none of the encoder's "
                    f"{vocabulary}"
                )

    def class_tokens(
        self, class_names: Sequence[str], prompt_set: str | PromptSet
    ) -> tuple[torch.Tensor, list[int]]:
        """Return the token ids int64 [n,L] of all sentences, class after class, and their numbers.

        The second value counts the sentences of each class. Raises UserError as `as_prompt_set` and
        `tokenize` do.
        """
        prompts = as_prompt_set(prompt_set)
        per_class = [prompts.sentences(name) for name in class_names]
        texts = [text for lines in per_class for text in lines]
        if not texts:
            return torch.zeros(0, self.context_length, dtype=torch.int64), []
        return self.tokenize(texts), [len(lines) for lines in per_class]

    @torch.no_grad()
    def class_embeddings(
        self,
        class_names: Sequence[str],
        prompt_set: str | PromptSet,
        progress: ProgressSink = no_progress,
        *,
        scored: bool = True,
    ) -> torch.Tensor:
        """Return unit class features float32 [C,D], in the order of `class_names`.

        Every sentence is encoded and normalised; the mean over a class's sentences is normalised
        again (MoTE, Zhu et al., NeurIPS 2024). Classes may have different numbers of sentences.
        If videos are `scored` by them, a warning names classes with `equal_texts`.
        Raises UserError as `as_prompt_set` and `tokenize` do.
        """
        tokens, counts = self.class_tokens(class_names, prompt_set)
        if not len(tokens):
            return torch.zeros(0, self.dim, device=self.device)
        # Sentences of similar length share a batch, so that short ones cost little.
        order = (tokens != 0).sum(dim=1).argsort(stable=True).tolist()
        embeddings = torch.empty(len(tokens), self.dim, device=self.device)
        for start in range(0, len(order), SENTENCES_PER_BATCH):
            chosen = order[start : start + SENTENCES_PER_BATCH]
            embeddings[chosen] = self.encode_tokens(tokens[chosen])
            progress(start + len(chosen), len(order))
        of_classes = mean_of_sentences(embeddings, counts)
        if scored and (same := equal_texts(class_names, of_classes)):
            more = f"; and {len(same) - NAMED} more" if len(same) > NAMED else ""
            logger.warning(
                "no score can tell these classes apart, because prompt set %s gives them the same "
                "text embedding: %s%s; give each its own words, for example with --descriptions",
                as_prompt_set(prompt_set).name,
                *("; ".join(map(" and ".join, same[:NAMED])), more),
            )
        return of_classes

    def _choose_precision(self, wanted: str) -> Precision:
        if wanted != "auto":
            return cast(Precision, wanted)
        candidate: Precision = "fp16" if self.device.type == "cuda" else "bf16"
        parameters = sum(parameter.numel() for parameter in self.image_tower.parameters())
        if parameters < MIN_TIMED_PARAMETERS:
            return "fp32"
        if self.device.type == "cpu" and not cpu_has_bf16():
            return "fp32"
        speedup, cosine = self._compare_with_fp32(PRECISIONS[candidate])
        chosen: Precision = candidate if speedup >= MIN_SPEEDUP and cosine >= MIN_COSINE else "fp32"
        logger.info(
            "precision %s: %s is %.1f times as fast as fp32 at cosine %.5f",
            chosen,
            candidate,
            speedup,
            cosine,
        )
        return chosen

    @torch.no_grad()
    def _compare_with_fp32(self, dtype: torch.dtype) -> tuple[float, float]:
        """(how many times faster than fp32, smallest cosine to fp32) on two random images."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(0, 256, (2, 3, *self.preprocessing.size), generator=generator)
        pixels = self.preprocessing.normalise(noise.to(torch.uint8))
        # This copy doubles the memory, but without it only OpenAI's fp16 weights would survive the
        # round trip.
        saved = {k: v.clone() for k, v in self.image_tower.state_dict().items()}
        full_seconds, full = self._timed(lambda: self._encode_batch(pixels, torch.float32))
        self.image_tower.to(dtype)
        reduced_seconds, reduced = self._timed(lambda: self._encode_batch(pixels, dtype))
        self.image_tower.to(torch.float32).load_state_dict(saved)
        cosine = float(F.cosine_similarity(full, reduced).nan_to_num(nan=-1.0).min())
        return full_seconds / reduced_seconds, cosine

    def _timed(self, run: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
        """Run twice; return the shorter time in seconds and the output.

        On a CPU it is CPU time, which does not depend on what else the machine does.
        """
        seconds = []
        on_gpu = self.device.type == "cuda"
        for _ in range(2):
            start = time.perf_counter() if on_gpu else time.process_time()
            output = run()
            if on_gpu:
                torch.cuda.synchronize(self.device)
            end = time.perf_counter() if on_gpu else time.process_time()
            seconds.append(max(end - start, 1e-9))
        return min(seconds), output


def image_embeddings(image_tower: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """Embed preprocessed images [N,3,s,s] with an image tower of open_clip -> [N,D]."""
    output = image_tower(pixels)
    # CoCa's tower returns its tokens as well.
    embeddings: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return embeddings


def load_encoder(
    spec: str | Path,
    precision: str = "auto",
    device: str = "cpu",
    encoders_dir: Path | None = None,
) -> Encoder:
    """Load a frozen CLIP.

    `spec`: a folder in open_clip's format, an OpenAI-format `.pt`, a name in `encoders_dir`,
    `viclip:FILE`, or `ARCH/TAG` as open_clip names its pretrained models. `device`: `auto` takes a
    GPU where there is one. `precision` of the image tower: `auto` takes bf16 on CPUs with bf16
    instructions (fp16 on GPUs) where it is at least 1.2 times as fast and keeps the cosine to fp32
    at 0.999 or more.
    Raises UserError for a spec or file that cannot be used, WorkError when weights cannot be
    fetched.
    """
    if precision not in (*PRECISIONS, "auto"):
        near = meant(precision, ("auto", *PRECISIONS))
        raise UserError(f"unknown precision {precision!r}: {near}use auto, {', '.join(PRECISIONS)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device!r} needs a GPU, and none can be used: use --device cpu")
    return Encoder(load_clip(str(spec), encoders_dir), precision, device)


def _tokenizer(loaded: LoadedClip) -> Any:
    text = loaded.model_config["text_cfg"]
    named = text.get("hf_tokenizer_name") or "siglip" in loaded.tokenizer_source.lower()
    try:
        if named and loaded.tokenizer_source:
            return open_clip.get_tokenizer(loaded.tokenizer_source)
        return open_clip.SimpleTokenizer(
            context_length=text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH),
            **text.get("tokenizer_kwargs", {}),
        )
    except Exception as error:
        raise UserError(
            f"the tokeniser of {loaded.name} cannot be loaded ({one_line(error, 160)}): "
            "install the package `transformers`, or use a CLIP with the standard tokeniser"
        ) from None


def equal_texts(names: Sequence[str], embeddings: torch.Tensor) -> list[list[str]]:
    """Return the names, in quotes, of classes that share a unit embedding of [C,D], in groups.

    A tokeniser makes one text of names that differ in case only, or beyond the words it can take.
    """
    held, first = embeddings.float().cpu(), torch.arange(len(names))
    for start in range(0, len(names), NAMES_PER_BLOCK):
        block = held[start : start + NAMES_PER_BLOCK]
        near = block @ held.T > 1 - 1e-6  # the cosines of two texts may be as near as this
        for at in torch.nonzero(near.sum(dim=1) > 1)[:, 0].tolist():
            same = (held - block[at]).abs().amax(dim=1) < 1e-6
            first[start + at] = same.float().argmax()
    groups: dict[int, list[str]] = {}
    for name, group in zip(names, first.tolist(), strict=True):
        groups.setdefault(group, []).append(quoted(name, 60))
    return [group for group in groups.values() if len(group) > 1]
