"""The golden end-to-end run: its files joined, its CLIP written as OpenAI would, its videos."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import torch

RUNS = {  # how the released scripts were run: sampling, crops
    "k400_1x1": ("uniform:8", 1),
    "k400_4x3": ("clips:8x4", 3),
    "k400_dense4x1": ("dense:8x4", 1),
    "zs_test_3x1": ("clips:8x3", 1),
    "zs_3x1": ("clips:8x3", 1),
}


class GoldenRun:
    """Files under `folder` (tests/data/golden/e2e); what has to be a file is written to `work`."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder = folder
        self.work = work
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        self.checkpoint = work / "MoTE_tiny.pt"
        self.checkpoint.write_bytes(self._joined("MoTE_tiny.pt"))
        self.clip_state = self._clip_state()
        self.clip = work / "tinyclip.pt"
        torch.save(self.clip_state, self.clip)
        with np.load(folder / "videos.npz") as videos:
            self.videos: list[npt.NDArray[np.uint8]] = [
                videos[name] for name in self.meta["video_names"]
            ]

    def result(self, run: str) -> dict[str, npt.NDArray[Any]]:
        """What the released script computed in `run`."""
        with np.load(self.folder / f"run_{run}.npz") as data:
            return {name: data[name] for name in data.files}

    def classes(self, run: str) -> list[str]:
        """Class names that `run` tested."""
        return list(self.meta[f"{self.meta['runs'][run]['classes']}_classes"])

    def write_names(self, which: str) -> Path:
        """The class list "k400" or "zs" as a CSV `id,name`."""
        file = self.work / f"{which}_labels.csv"
        lines = [f'{i},"{name}"' for i, name in enumerate(self.meta[f"{which}_classes"])]
        file.write_text("\n".join(["id,name", *lines]) + "\n")
        return file

    def write_list(self, which: str) -> Path:
        """`path label` lines of all videos; called val.txt, so that they are the val split."""
        file = self.work / which / "val.txt"
        file.parent.mkdir()
        names = [Path(name).stem for name in self.meta["video_names"]]
        labels = self.meta[f"{which}_labels"]
        pairs = zip(names, labels, strict=True)
        file.write_text("".join(f"{name}.mkv {label}\n" for name, label in pairs))
        return file

    def write_videos(self) -> Path:
        """The frames as lossless H.264 in RGB; returns the folder."""
        folder = self.work / "videos"
        folder.mkdir()
        for name, frames in zip(self.meta["video_names"], self.videos, strict=True):
            write_lossless(folder / f"{Path(name).stem}.mkv", frames)
        return folder

    def _joined(self, name: str) -> bytes:
        return b"".join(part.read_bytes() for part in sorted(self.folder.glob(f"{name}.part*")))

    def _clip_state(self) -> dict[str, torch.Tensor]:
        with np.load(io.BytesIO(self._joined("tinyclip_state.npz"))) as data:
            state = {name: torch.from_numpy(np.asarray(data[name])) for name in data.files}
        rows, values = state.pop("token_embedding_rows"), state.pop("token_embedding_values")
        table = torch.zeros(int(state["vocab_size"]), values.shape[1], dtype=values.dtype)
        table[rows.long()] = values
        return {**state, "token_embedding.weight": table}


def write_lossless(path: Path, frames: npt.NDArray[np.uint8]) -> None:
    """RGB frames uint8 [T,H,W,3] as a video that decodes to the same bytes."""
    with av.open(str(path), "w", format="matroska") as output:
        stream = output.add_stream("libx264rgb", rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        stream.options = {"crf": "0", "preset": "ultrafast"}
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))
