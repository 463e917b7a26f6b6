"""Decoding, resizing, cropping and normalising on the GPU with NVIDIA DALI.

F frames of a clip, H, W height and width of its picture, C crops, h, w of the input of the tower.

The graph is `decode -> resize -> crop and normalise`, once per crop. Sizes and corners are computed
by `pipeline.preprocessing`, so they are those of the CPU path; DALI's own would differ by a pixel
or more. With `device_id=None` and another `decode` the same graph runs without a GPU, as in tests.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from ctypes import CDLL
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.dlpack import from_dlpack

from featstore.errors import UserError, one_line
from pipeline.decoding.contract import Strictness
from pipeline.preprocessing import Preprocessing, crop_corners, resized_size

logger = logging.getLogger(__name__)

DECODER_NAME = "dali"
PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
NVDEC_LIBRARY = "libnvcuvid.so.1"

# (encoded bytes [n] or whatever the clips hold, frame indices int32 [F]) -> uint8 [F,H,W,3].
Decode = Callable[[Any, Any], Any]


@dataclass(frozen=True, slots=True)
class Clip:
    """Chosen frames of one video: its bytes uint8 [n], increasing indices int64 [F], size, codec.

    `data` is uint8 [frames,H,W,3] if the graph was built to take decoded frames.
    """

    data: npt.NDArray[np.uint8]
    frames: npt.NDArray[np.int64]
    height: int
    width: int
    codec: str = ""


def dali_problem() -> str | None:
    """Why DALI cannot decode on this machine, as the end of an error message; None if it can.

    Checks the package, the GPU and the driver's video decoder; decodes nothing.
    """
    return import_problem() or _device_problem()


@cache
def import_problem() -> str | None:
    """Why DALI itself cannot be used (missing, broken or too old), None if it can."""
    try:
        dali = importlib.import_module("nvidia.dali")
        fn = importlib.import_module("nvidia.dali.fn")
    except ImportError as error:
        return f"DALI cannot be imported ({one_line(error, 120)})"
    except Exception as error:  # a broken library can raise anything
        return f"DALI is broken ({one_line(error, 120)})"
    if not hasattr(getattr(fn, "decoders", None), "video"):
        return f"DALI {dali.__version__} has no decoders.video: install 1.52 or newer"
    return None


def _device_problem() -> str | None:
    if not torch.cuda.is_available():
        return "no GPU can be used"
    try:
        CDLL(NVDEC_LIBRARY)
    except OSError:
        return (
            f"the driver's video decoder ({NVDEC_LIBRARY}) is missing: in a container, start it "
            "with NVIDIA_DRIVER_CAPABILITIES=compute,utility,video"
        )
    return None


def dali_version() -> dict[str, str]:
    """The installed DALI as {package: version}, for provenance."""
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            return {package: version(package)}
    return {}


def wants_dali(decoder: str, device: str, strict: Strictness = "auto") -> bool:
    """Return whether `--decoder`, `--device` and the strictness select the GPU's decoder.

    "auto" uses it on a CUDA device if possible; if it is not possible, a log line says why.
    Raises UserError if `--decoder` names it and it cannot be used.
    """
    resolved = device
    if device == "auto":  # as for the encoder
        resolved = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = torch.device(resolved).type == "cuda"
    if decoder != DECODER_NAME and (decoder != "auto" or not on_gpu):
        return False
    problem, remedy = dali_problem(), "use --decoder pyav"
    if strict == "always":
        # NVDEC does not report damage.
        problem = "it cannot notice damage, as --strict-decode asks"
    if not on_gpu and device != "auto":
        problem = f"it needs a GPU, and the device is {device}"
        remedy = "use --device cuda, or --decoder pyav"
    if problem is None:
        return True
    if decoder == DECODER_NAME:
        raise UserError(f"decoder {decoder!r} cannot be used: {problem}; {remedy}")
    logger.info("videos are decoded on the CPU: %s", problem)
    return False


def nvdec_decode(encoded: Any, frames: Any) -> Any:
    """Build the decode stage of the graph, which runs on the GPU."""
    fn = importlib.import_module("nvidia.dali.fn")
    # The default pad_mode gives black frames without an error where a frame does not exist.
    # Threads pinned to cores would disturb the readers.
    return fn.decoders.video(encoded, device="mixed", frames=frames, pad_mode="none", affine=False)


class _Graph:
    """Runs batches of clips through DALI: `decode`, then the outputs of a subclass.

    At most `batch_size` clips at a time, from one thread at a time; `device_id` is the GPU, None
    for DALI's CPU operators, which then need a `decode` of their own and clips with
    `rank`-dimensional data.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        threads: int,
        device_id: int | None,
        decode: Decode = nvdec_decode,
        rank: int = 1,
    ) -> None:
        dali = importlib.import_module("nvidia.dali")
        fn = importlib.import_module("nvidia.dali.fn")
        types = importlib.import_module("nvidia.dali.types")
        cuda: Any = torch.cuda  # the streams' annotations are incomplete
        self._stream = cuda.Stream(device_id) if device_id is not None else None
        # Depth 1: `run` gets the inputs, and the caller's queue holds what is decoded ahead.
        self._graph = dali.Pipeline(
            batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=1
        )
        with self._graph:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=rank)
            frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1)
            self._graph.set_outputs(*self._outputs(fn, types, decode(encoded, frames)))
        self._graph.build()

    def _outputs(self, fn: Any, types: Any, frames: Any) -> list[Any]:
        """The graph's outputs from the decoded frames."""
        raise NotImplementedError

    def _run(self, clips: Sequence[Clip], **inputs: list[Any]) -> Any:
        """DALI's outputs, each with a tensor per clip, to be used on the graph's stream."""
        return self._graph.run(
            encoded=[clip.data for clip in clips],
            frames=[clip.frames.astype(np.int32) for clip in clips],
            **inputs,
        )


class DaliPixels(_Graph):
    """Decodes batches of clips to the tower's input.

    `preprocessing` and `crops` are as in `Preprocessing.crops`; `half` gives float16 instead of
    float32; `machine` are the arguments of `_Graph`.
    """

    def __init__(
        self, preprocessing: Preprocessing, crops: int, *, half: bool = False, **machine: Any
    ) -> None:
        preprocessing.require_crops(crops)
        self._preprocessing = preprocessing
        # Ten crops are five and their mirror images, in turn.
        self._corners = 5 if crops == 10 else crops
        self._mirror = (0, 1) if crops == 10 else (0,)
        self._half = half
        super().__init__(**machine)

    def __call__(self, clips: Sequence[Clip]) -> list[torch.Tensor]:
        """Return normalised pixels [C,F,3,h,w] of each clip, complete and on the graph's device.

        Raises RuntimeError if any clip fails, without saying which; the next call works again.
        """
        with torch.cuda.stream(self._stream):  # does nothing for None
            outputs = self._run(clips, **self._inputs(clips))
            pixels = [
                torch.stack([from_dlpack(output[i]) for output in outputs])
                for i in range(len(clips))
            ]
            if self._stream is not None:
                self._stream.synchronize()  # another stream will read them
            return pixels

    def _outputs(self, fn: Any, types: Any, frames: Any) -> list[Any]:
        settings = self._preprocessing
        modes = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
        size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
        resized = fn.resize(
            frames, size=size, interp_type=modes[settings.interpolation], antialias=True
        )
        outputs = []
        for number in range(self._corners):
            corner = {
                f"crop_pos_{axis}": fn.external_source(
                    name=f"{axis}{number}", dtype=types.FLOAT, ndim=0
                )
                for axis in "xy"
            }
            outputs += [
                fn.crop_mirror_normalize(
                    resized,
                    crop=settings.size,
                    **corner,
                    # The corners are whole numbers, except for float32 rounding.
                    rounding="round",
                    mirror=mirror,
                    dtype=types.FLOAT16 if self._half else types.FLOAT,
                    output_layout="FCHW",
                    mean=[255 * value for value in settings.mean],
                    std=[255 * value for value in settings.std],
                    # Only resize mode "longest" leaves a border.
                    out_of_bounds_policy="pad",
                    fill_values=[
                        (settings.fill_color / 255 - mean) / std
                        for mean, std in zip(settings.mean, settings.std, strict=True)
                    ],
                )
                for mirror in self._mirror
            ]
        return outputs

    def _inputs(self, clips: Sequence[Clip]) -> dict[str, list[Any]]:
        """The graph's further inputs by name, one value per clip."""
        target, mode = self._preprocessing.size, self._preprocessing.resize_mode
        sizes = [resized_size(clip.height, clip.width, target, mode) for clip in clips]
        inputs: dict[str, list[Any]] = {"size": [np.array(size, np.float32) for size in sizes]}
        for number in range(self._corners):
            corners = [self._corner(size, number) for size in sizes]
            spare = [(width - target[1], height - target[0]) for height, width in sizes]
            for axis, name in enumerate("xy"):
                inputs[f"{name}{number}"] = [
                    np.float32(corner[axis] / (room[axis] or 1))
                    for corner, room in zip(corners, spare, strict=True)
                ]
        return inputs

    def _corner(self, size: tuple[int, int], number: int) -> tuple[int, int]:
        """(x, y) of a crop of a picture resized to `size`; negative where the picture is padded."""
        target = self._preprocessing.size
        if self._preprocessing.resize_mode == "longest":
            top, left = (target[0] - size[0]) // 2, (target[1] - size[1]) // 2
            return -left, -top
        return crop_corners(*size, target, self._corners)[number]


class DaliFrames(_Graph):
    """Decodes batches of clips to frames in memory.

    Frames are not resized here: the CPU's augmentation does that exactly, and frames cross the bus
    as bytes.
    """

    def _outputs(self, fn: Any, types: Any, frames: Any) -> list[Any]:
        return [frames]

    def __call__(self, clips: Sequence[Clip]) -> list[npt.NDArray[np.uint8]]:
        """Return RGB uint8 [F,H,W,3] of each clip, in memory of its own. Raises as `DaliPixels`."""
        with torch.cuda.stream(self._stream):  # does nothing for None
            (output,) = self._run(clips)
            return [from_dlpack(output[i]).to("cpu", copy=True).numpy() for i in range(len(clips))]
