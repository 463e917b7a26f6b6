"""Predict the classes of videos that belong to no data set."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch.nn import functional

from featstore.errors import UserError, WorkError, counted, one_line, safe_text
from featstore.format.class_texts import DEFAULT_PROMPTS
from featstore.progress import ProgressSink, no_progress
from featstore.workspace import Workspace
from heads.arithmetic import resolve_device
from heads.compatibility import check_encoder, mean_head
from heads.files.head_file import choose_head, head_fingerprint
from heads.methods.head import Head
from heads.methods.settings import HeadOrigin
from heads.prediction.answer_file import AnswerFile
from heads.prediction.answers import Answer, Lines, Window, form_of, stamp_of
from heads.prediction.classes import NamedClasses
from heads.prediction.pixel_encoder import encoder_of_head, sampling_of
from heads.prediction.request import PredictionRequest
from heads.prediction.videos import NamedVideo, find_videos
from heads.scoring.scores import can_modulate, require_projection, view_probabilities
from pipeline.clip_encoder import Encoder
from pipeline.decoding.chosen_frames import decode_chosen
from pipeline.decoding.contract import DecodeError, VideoInfo
from pipeline.decoding.nvdec.graphs import DECODER_NAME, wants_dali
from pipeline.decoding.pyav import PyAVDecoder
from pipeline.encoders.specs import DEFAULT_ENCODER
from pipeline.extraction.cpu_pool import EncodedVideo, ThreadVideoPool, VideoPool, open_pool
from pipeline.extraction.tiers import PooledEmbeddings
from pipeline.prompts import PromptSet, as_prompt_set, trained_prompt_set
from pipeline.sampling import Windows, window_bounds

logger = logging.getLogger(__name__)

FRAMES_WITHOUT_HEAD: Final = 8
# Heads are trained on clips of about 10 s, as Kinetics cuts them (Kay et al., 2017). Over three
# times that, 8 frames lie about 4 s apart, and most actions fall between them.
LONG_SECONDS: Final = 30.0
USUAL_WINDOW: Final = 10  # seconds, named in the warning about a long video
LONG_SHOWN: Final = 3
# A larger file is read as a stream: several of them would not fit into memory.
IN_MEMORY_BYTES: Final = 1 << 26
# A narrow head takes about as long for one video as for several: this by its width are scored
# together. No video waits longer for others than so many seconds.
TOGETHER_WIDTH: Final = 1024
TOGETHER_SECONDS: Final = 0.5
# So many videos are handed out ahead, so that workers go on while others are scored. What waits is
# a path before its turn and a few embeddings after it.
AHEAD: Final = 64
# Windows are decoded so many at a time, which bounds the memory of a long video by this.
WINDOW_BYTES: Final = 1 << 27


class Predictor:
    """A head, an encoder and class texts, ready to predict the videos of a request.

    `name` is the head's, `encoder` the encoder's as it was named, `frames` are taken of every video
    or window. `done_before` counts videos whose answers the output file held already, `failed` all
    videos without a prediction, known so far.
    """

    def __init__(self, workspace: Workspace, request: PredictionRequest) -> None:
        """Load everything. Raises UserError for classes, a head or an encoder that do not exist or
        do not fit each other, and for an output file that was begun with other settings.
        """
        self.request = request
        self._file: AnswerFile | None = None
        if request.out is not None:
            self._file = AnswerFile(request.out, form_of(request.out, request.form))
        begun = self._file.begun_with() if self._file is not None else {}
        model, run_dir = choose_head(workspace, request.head, or_mean=True)
        self.name = workspace.head_name(run_dir)
        origin = None if model is None else model.origin
        self._names, prompt_set = _classes(request, origin)
        if model is not None:
            model.require_classes(self._names)
        self.encoder = request.encoder or (DEFAULT_ENCODER if origin is None else origin.encoder)
        precision = request.precision
        if precision == "auto":  # it is chosen by timing; a file that was begun keeps the choice
            precision = begun.get("precision", precision)
        self._clip = self._load(workspace, model, precision)
        self._texts = self._clip.class_embeddings(self._names, prompt_set).cpu()
        named = "" if model is None else f" {head_fingerprint(model)}"
        self._head = model or mean_head(self._clip.dim, self._clip.logit_scale)
        projects = self._projects(request, origin)
        if projects is False:
            self._head.shrink(1)
        self._modulate = request.modulate and can_modulate(self._head, len(self._names))
        trained = None if origin is None else origin.frames * self._clip.clip_frames
        self.frames = request.frames or trained or FRAMES_WITHOUT_HEAD
        self._clip.require_clips(self.frames)
        self._sampling = sampling_of(model, self.frames)
        self.top = min(request.top, len(self._names))
        self._together = max(1, TOGETHER_WIDTH // self._clip.dim)
        self._long = 0
        self._open_file(prompt_set, named, projects)

    def answers(self, progress: ProgressSink = no_progress) -> Iterator[Answer]:
        """Yield the answer of every video that is not done yet, as soon as it is there.

        A video that cannot be used has its reason as `error`, which is also logged. Raises
        `WorkError` when the encoder itself fails.
        """
        left = [video for video in self.request.videos if video.path not in self._done]
        started, finished = time.perf_counter(), 0
        progress(0, len(left))
        with closing(self):
            for answer in self._answers(left):
                if answer.error:
                    self.failed += 1
                    logger.warning("%s: %s", answer.path, answer.error)
                if self._file is not None:
                    self._file.add(answer)
                finished += 1
                progress(finished, len(left))
                yield answer
        if self._long > LONG_SHOWN:
            logger.warning("%s as long or longer in all", counted(self._long, "video"))
        if len(self.request.videos) > 1 and left:
            seconds = time.perf_counter() - started
            logger.info(
                "%s: %d done in %.1f s (%.2f/s), %d before, %d failed",
                counted(len(self.request.videos), "video"),
                finished,
                seconds,
                finished / seconds,
                self.done_before,
                self.failed,
            )

    def to_json(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return what `predict --json` prints, with the videos in the order of the request."""
        order = {video.path: number for number, video in enumerate(self.request.videos)}
        told = sorted(answers, key=lambda answer: order[answer.path])
        value: dict[str, Any] = {"head": self.name, "encoder": self.encoder}
        value["videos"] = [answer.to_json() for answer in told]
        if self.request.out is not None:
            value |= {"out": str(self.request.out), "done_before": self.done_before}
        return value

    def close(self) -> None:
        """Close the output file."""
        if self._file is not None:
            self._file.close()

    def _load(self, workspace: Workspace, head: Head | None, precision: str) -> Encoder:
        origin = None if head is None else head.origin
        on = resolve_device(self.request.device).type
        folder = workspace.root / "encoders"
        try:
            encoder = encoder_of_head(head, self.encoder, precision, on, folder)
        except UserError as error:
            if self.request.encoder is not None or origin is None:
                raise
            raise UserError(
                f"head {self.name}: {error}; name its encoder with --encoder"
            ) from error
        if origin is not None:
            if self.request.head is None and origin.encoder_fingerprint != encoder.fingerprint:
                raise UserError(
                    f"{self.name}, the newest head, belongs to {origin.encoder}, not to "
                    f"{self.encoder}: add --head mean for that encoder alone, or leave --encoder "
                    "out"
                )
            check_encoder(origin, self.encoder, encoder.fingerprint)
        return encoder

    def _projects(self, request: PredictionRequest, origin: HeadOrigin | None) -> bool | None:
        """Return whether the head's projection is used; None if it has none."""
        require_projection(self._head.config, request.projection)
        if not self._head.config.projects or request.projection is not None:
            return request.projection
        known = () if origin is None else origin.class_names or ()
        return set(self._names) <= set(known)

    def _open_file(self, prompt_set: PromptSet, head_hash: str, projects: bool | None) -> None:
        request = self.request
        settings = {
            "head": f"{self.name}{head_hash}",
            "encoder": self._clip.fingerprint[:16],
            "precision": self._clip.precision,
            "frames": str(self.frames),
            "window": f"{request.window:g}" if request.window else "none",
            "classes": str(len(self._names)),
            "sentences": prompt_set.hash(self._names)[:16],
            "top": str(self.top),
            "modulate": "yes" if self._modulate else "no",
            **({} if projects is None else {"projection": "on" if projects else "off"}),
        }
        self._done: dict[str, bool] = {}
        self._stamps = {video.path: ("", "") for video in request.videos}
        if self._file is not None:
            for video in request.videos:
                self._stamps[video.path] = ("", "") if video.problem else stamp_of(Path(video.path))
            safe = {name: safe_text(text) for name, text in settings.items()}
            lines = Lines(self._file.form, self.top, bool(request.window), safe)
            self._file.open(lines, self._stamps, self._names)
            self._done = self._file.done
        self.done_before = len(self._done)
        self.failed = sum(self._done.values())
        logger.info(
            "head %s, encoder %s, %s, %s a %s",
            self.name,
            self.encoder,
            counted(len(self._names), "class", "classes"),
            counted(self.frames, "frame"),
            "window" if request.window else "video",
        )

    def _answers(self, videos: Sequence[NamedVideo]) -> Iterator[Answer]:
        for video in videos:
            if video.problem:
                yield Answer(video.path, error=video.problem)
        on = self._clip.device.type
        common = self._clip, self._sampling, PooledEmbeddings(self._clip)
        # Windows are sought in the file, which NVDEC is not asked to do.
        by_gpu = not self.request.window and self._clip.clip_frames == 1 and wants_dali("auto", on)
        name = DECODER_NAME if by_gpu else PyAVDecoder.name
        with closing(open_pool(name, *common, workers=self.request.workers)) as pool:
            yield from self._encoded([v.path for v in videos if not v.problem], pool)

    def _encoded(self, paths: Sequence[str], pool: VideoPool) -> Iterator[Answer]:
        """Keep the pool filled with parts of videos; answer each video when its last part is in."""
        waiting: dict[Future[EncodedVideo | str], _Part] = {}
        parts: dict[str, dict[int, EncodedVideo]] = {}
        whole: list[tuple[_Part, list[EncodedVideo]]] = []  # videos to score
        since = time.monotonic()  # the first of them is whole
        ahead = max(pool.window, AHEAD) if isinstance(pool, ThreadVideoPool) else pool.window

        def taken() -> Iterator[Answer]:
            nonlocal since
            limit = max(0.0, since + TOGETHER_SECONDS - time.monotonic()) if whole else None
            for future in wait(waiting, limit, FIRST_COMPLETED).done:
                part = waiting.pop(future)
                found = parts.get(part.path)
                if found is None:
                    continue  # another part of it has failed
                result = _result(part.path, future)
                if not isinstance(result, EncodedVideo):
                    del parts[part.path]
                    yield result if isinstance(result, Answer) else self._failed(part.path, result)
                    continue
                found[part.number] = result
                if len(found) == part.count:
                    since = since if whole else time.monotonic()
                    whole.append((part, [found[number] for number in range(part.count)]))
                    del parts[part.path]
            late = not waiting or time.monotonic() >= since + TOGETHER_SECONDS
            if whole and (late or len(whole) >= self._together):
                yield from self._scored(whole)
                whole.clear()

        for path in paths:
            try:
                cut = self._cut(path)
            except DecodeError as error:
                yield self._failed(path, error.reason)
                continue
            parts[path] = {}
            for part in cut:
                while len(waiting) >= ahead:
                    yield from taken()
                waiting[part.submit(pool)] = part
        while waiting or whole:
            yield from taken()

    def _cut(self, path: str) -> list[_Part]:
        """Return the parts of a video that are decoded one by one. Raises `DecodeError`."""
        if not self.request.window:
            return [_Part(path)]
        size, mode = self._clip.preprocessing.size, self._clip.preprocessing.resize_mode
        info, _, _ = decode_chosen(
            Path(path), PyAVDecoder(), lambda _: np.zeros(1, np.int64), size, mode
        )
        rate = info.num_frames / info.duration_s if info.duration_s > 0 else info.fps
        bounds = window_bounds(info.num_frames, rate, self.request.window)
        at_once = max(1, WINDOW_BYTES // (self.frames * info.width * info.height * 3))
        starts = range(0, len(bounds) - 1, at_once)
        return [
            _Part(
                *(path, number, len(starts)),
                Windows(bounds[start : start + at_once + 1], self.frames, self._sampling.kind),
                tuple(bound / rate for bound in bounds),
            )
            for number, start in enumerate(starts)
        ]

    def _scored(self, videos: Sequence[tuple[_Part, Sequence[EncodedVideo]]]) -> Iterator[Answer]:
        """Score videos together, given the features [V,F,D] of their parts; a view is a window."""
        views = [
            torch.cat([torch.from_numpy(e.features) for e in encoded]) for _, encoded in videos
        ]
        scores = torch.split(self._scores(torch.cat(views)), [len(view) for view in views])
        for (part, encoded), rows in zip(videos, scores, strict=True):
            info, windows = encoded[0].info, None
            if part.seconds is not None:
                spans = zip(pairwise(part.seconds), rows, strict=True)
                windows = [Window(*span, self._best(row)) for span, row in spans]
            long = self._said_of_length(part.path, info) if windows is None else ""
            others = sum(part.info.other_sizes for part in encoded)
            odd = replace(info, other_sizes=others).oddities()
            note = "; ".join(filter(None, (long, odd)))
            best, stamp = self._best(rows.mean(0)), self._stamps[part.path]
            yield Answer(part.path, info.num_frames, best, "", note, windows, stamp)

    def _scores(self, views: torch.Tensor) -> torch.Tensor:
        """Return the scores [n,C] float64 of views [n,F,D].

        The head always gets as many views at a time, filled up with zeros, so that not even the
        last bit of a score depends on what is scored beside it.
        """
        filled = functional.pad(views, (0, 0, 0, 0, 0, -len(views) % self._together))
        scoring = self._texts, self._modulate, self._names
        parts = [
            view_probabilities(self._head, group[:, None], *scoring)[:, 0]
            for group in torch.split(filled, self._together)
        ]
        return torch.cat(parts)[: len(views)]

    def _best(self, scores: torch.Tensor) -> list[tuple[str, float]]:
        """Return the best classes of scores [C]; in a tie the one that is named first."""
        best, places = torch.sort(scores, descending=True, stable=True)
        named = [self._names[place] for place in places[: self.top].tolist()]
        return list(zip(named, best.tolist(), strict=False))

    def _failed(self, path: str, reason: str) -> Answer:
        return Answer(path, error=reason, stamp=self._stamps[path])

    def _said_of_length(self, path: str, info: VideoInfo) -> str:
        """Return what to note of a long video, and warn of the first ones; "" for a short one."""
        seconds = info.duration_s
        if seconds <= LONG_SECONDS:
            return ""
        length = f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.1f} minutes"
        said = (
            f"{self.frames} frames over {length}: --window {USUAL_WINDOW} predicts every "
            f"{USUAL_WINDOW} seconds of it"
        )
        self._long += 1
        if self._long <= LONG_SHOWN:
            logger.warning("%s is long, %s", path, said)
        return said


def predict(
    workspace: Workspace,
    videos: Sequence[str | Path],
    classes: Sequence[str] | None = None,
    *,
    progress: ProgressSink = no_progress,
    **settings: Any,
) -> dict[str, Any]:
    """Return the best classes of each video; the scores of all classes add up to 1.

    `videos` are files, folders or globs; `settings` are fields of `PredictionRequest`. Returns
    `head`, `encoder` and `videos`, JSON-ready: `path`, `num_frames`, `predictions` of `class_name`
    and `score`, and `error` if a video cannot be used. Raises UserError for files, classes, a head
    or an encoder that do not exist or do not fit, and as `Predictor` does.
    """
    named = None if classes is None else NamedClasses(tuple(classes))
    predictor = Predictor(workspace, PredictionRequest(find_videos(videos), named, **settings))
    return predictor.to_json(list(predictor.answers(progress)))


@dataclass(frozen=True)
class _Part:
    """Part `number` of the `count` of a video: the whole video, or some windows of it.

    `seconds` are the ends of all windows of the video.
    """

    path: str
    number: int = 0
    count: int = 1
    windows: Windows | None = None
    seconds: tuple[float, ...] | None = None

    def submit(self, pool: VideoPool) -> Future[EncodedVideo | str]:
        if self.windows is None:
            return pool.submit(partial(_source, Path(self.path)))
        assert isinstance(pool, ThreadVideoPool)
        return pool.submit(partial(Path, self.path), self.windows)


def _source(path: Path) -> bytes | Path:
    return path if path.stat().st_size > IN_MEMORY_BYTES else path.read_bytes()


def _result(path: str, future: Future[EncodedVideo | str]) -> EncodedVideo | str | Answer:
    """Return what a pool gave; an answer for a file that cannot be read now."""
    try:
        return future.result()
    except OSError as error:  # without the file's stamp, so that a later run tries again
        return Answer(path, error=f"cannot be read ({error.strerror})")
    except (WorkError, RuntimeError) as error:
        # Torch ran out of memory, for example: the video is not at fault.
        raise WorkError(
            f"the encoder failed at {path} ({one_line(error, 200)}): what is printed or in --out "
            "is done; run the same command again, perhaps with fewer --workers"
        ) from error


def _classes(
    request: PredictionRequest, origin: HeadOrigin | None
) -> tuple[tuple[str, ...], PromptSet]:
    """Return the classes to choose from and the sentences that stand for them."""
    named, origin_names = request.classes, None if origin is None else origin.class_names
    if named is None:
        if origin_names is None:
            raise UserError(
                'no classes to choose from: name them with --classes "a,b,c" or --classes FILE'
            )
        named = NamedClasses(tuple(origin_names))
    if named.descriptions is not None:
        if request.prompts is not None:
            raise UserError(
                f"{named.descriptions.source} has sentences for each class, and --prompts "
                f"{request.prompts} names others: leave one out"
            )
        return named.names, named.descriptions
    if request.prompts is None and origin is not None:
        return named.names, trained_prompt_set(origin.prompt_set, origin.prompt_templates)
    return named.names, as_prompt_set(request.prompts or DEFAULT_PROMPTS)
