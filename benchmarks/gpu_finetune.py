"""Does end-to-end training keep a GPU busy? Clips/s of `finetune` on one, against the bare loop.

ViT-B/16, 8 frames, bfloat16: forward, loss, backward and optimiser on clips that lie on the GPU;
the same from packed videos that PyAV decodes on the CPU; and from videos that NVDEC decodes
through DALI, where it can be used. The second epoch counts: the first one warms up.

On a machine without a GPU this prints one line and does nothing.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import common
import torch
from bench_finetune import BareLoop, measured, packed, request

from featstore.files.machine import usable_cores
from pipeline.decoding.nvdec.graphs import dali_problem, dali_version

FRAMES = 8


def main() -> None:
    chosen = common.options(__doc__, batch=64, steps=20, precision="bf16")
    if not torch.cuda.is_available():
        print("no GPU can be used here: not run on a GPU")
        return
    if chosen.quick:
        chosen.batch, chosen.steps = 8, 4
    logging.getLogger().setLevel(logging.ERROR)
    where = common.machine()
    where["name"] = f"{torch.cuda.get_device_name()}, {usable_cores()} cores"
    encoder = common.vit_b16_folder()
    dataset = packed("gpu-finetune", chosen.steps * chosen.batch, common.kinetics_clips(32))
    bare = BareLoop(encoder, chosen.batch, FRAMES, chosen.precision)
    bare.seconds(3)
    baseline = bare.seconds(chosen.steps)
    del bare
    problem = dali_problem()
    decoders = ["pyav"] if problem else ["pyav", "dali"]
    if problem:
        print(f"without DALI: {problem}")
    settings = {"batch_size": chosen.batch, "frames": FRAMES, "precision": chosen.precision}
    rows, shown = [], [["bare loop", chosen.batch / baseline, baseline, 1.0, 0.0]]
    for decoder in decoders:
        asked = replace(request(dataset, encoder, epochs=2, **settings), decoder=decoder)
        step, waiting = measured(asked)
        shown.append([decoder, chosen.batch / step, step, baseline / step, waiting])
        rows.append(
            common.Row(
                f"clips/s of `finetune`, ViT-B/16, {FRAMES} frames, {chosen.precision}, decoder "
                f"{decoder}; waiting for data {waiting:.0%} of a step",
                f"{chosen.batch / step:.0f} clips/s",
                f"bare loop {chosen.batch / baseline:.0f} clips/s",
                baseline / step,
                "none",
            )
        )
    print(where["name"])
    common.table(["decoder", "clips/s", "s per step", "of the bare loop", "waiting"], shown)
    common.save("gpu_finetune", where, rows, {"versions": dali_version()})


if __name__ == "__main__":
    main()
