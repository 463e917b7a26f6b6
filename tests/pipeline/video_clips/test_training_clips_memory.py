"""Memory of a long epoch: it does not grow with the number of steps."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from pipeline.preprocessing import Preprocessing
from pipeline.video_clips.stream import ClipStream
from tests.support.worlds.media import make_video
from tests.support.worlds.tar_sets import write_dataset

STEPS, WARM = 500, 100
BATCH_MB = 2 * 4 * 3 * 224 * 224 * 4 / 1e6


def resident_mb() -> float:
    """Memory of this process now, in megabytes of 10^6 bytes."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_does_not_grow_over_500_steps(tmp_path: Path) -> None:
    clip = make_video(frames=12, width=72, height=48, gop=5)
    tars = [{f"v{tar:02d}{n:02d}": clip for n in range(50)} for tar in range(20)]
    dataset = write_dataset(tmp_path / "made", tars)
    stream = ClipStream(
        dataset,
        split="train",
        frames=4,
        preprocessing=Preprocessing(),
        batch_size=2,
        seed=0,
        workers=2,
    )
    assert stream.steps_per_epoch == STEPS
    resident = []
    for step, batch in enumerate(stream.epoch(0)):
        assert len(batch.keys) == 2
        if step >= WARM and step % 50 == 0:
            resident.append(resident_mb())
    # Four batches are in memory at a time; one more a step would be 1900 MB.
    growth = np.mean(resident[-2:]) - np.mean(resident[:2])
    assert growth < 5 * BATCH_MB, resident
