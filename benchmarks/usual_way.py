"""Frame features the usual way: what a script without this program does, kept as a baseline.

One process. Every frame of a video is decoded in order (PyAV, with the frame threads that its
documentation recommends), the wanted ones become Pillow images and go through open_clip's own
preprocessing (bicubic resize, centre crop, normalise), and an fp32 open_clip model with PyTorch's
default threads encodes batches of 32 frames, whatever videos they come from. Nothing here is from
this project's packages. The frames are those of `uniform:F`: number int(n / F * k) of n, k < F.

    python benchmarks/usual_way.py TARS ENCODER OUT.npz --frames 8

writes one array float32 [F, D] per video, named by its key, and prints one JSON object: the moment
the work began (`time.monotonic()`), videos and frames.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import open_clip
import torch

BATCH = 32


def videos_of(tars: Path) -> Iterator[tuple[str, bytes]]:
    """(key, bytes) of every video in the tars of a folder."""
    for path in sorted(tars.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is not None and not member.name.endswith(".json"):
                    yield member.name.partition(".")[0], content.read()


def chosen_frames(data: bytes, count: int) -> list[Any]:
    """`count` frames spread over the video, as Pillow images."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        frames = list(container.decode(stream))
        return [frames[int(len(frames) / count * k)].to_image() for k in range(count)]


def main() -> None:
    """Extract the features of all videos of a folder of tars."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tars", type=Path, help="folder of packed tars")
    parser.add_argument("encoder", type=Path, help="folder in open_clip's format")
    parser.add_argument("out", type=Path, help=".npz with the features of every video")
    parser.add_argument("--frames", type=int, default=8, help="frames of a video")
    chosen = parser.parse_args()
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{chosen.encoder}")
    model.eval()
    began = time.monotonic()
    keys: list[str] = []
    waiting: list[torch.Tensor] = []
    encoded: list[torch.Tensor] = []
    with torch.inference_mode():
        for key, data in videos_of(chosen.tars):
            keys.append(key)
            waiting += [preprocess(image) for image in chosen_frames(data, chosen.frames)]
            while len(waiting) >= BATCH:
                encoded.append(model.encode_image(torch.stack(waiting[:BATCH])))
                del waiting[:BATCH]
        if waiting:
            encoded.append(model.encode_image(torch.stack(waiting)))
    features = torch.cat(encoded).view(len(keys), chosen.frames, -1).numpy()
    np.savez(chosen.out, **dict(zip(keys, features, strict=True)))
    print(json.dumps({"began": began, "videos": len(keys), "frames": chosen.frames}))


if __name__ == "__main__":
    main()
