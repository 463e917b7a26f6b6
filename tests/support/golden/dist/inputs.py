"""What DiST is given in golden files: frames, crops, mixed clips, tokens."""

from __future__ import annotations
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
import numpy as np
from heads.methods.dist.training import MIRRORED, draw_mix, mixed, soft_targets
from pipeline.float_frames import FloatDraw, evaluation_floats, random_part, training_floats
from pipeline.prompts import bare_sentence
from pipeline.sampling import dist_test_indices, dist_train_indices
from tests.support.golden.checks import SAME_DISTRIBUTION, Check, tensor, worst
from tests.support.golden.dist.branch import compact_sums

def check_frame_indices(file: Path) -> Iterator[Check]:
    cases = json.loads(file.read_text())
    wrong = sum(
        dist_test_indices(c["n"], c["T"], c["views"])[c["view"]].tolist() != c["frames"]
        for c in cases["eval"]
    )
    yield Check(f"evaluation: wrong of {len(cases['eval'])}", wrong, 0)
    wrong = 0
    for c in cases["train"]:
        draws = {"frames": c["u"], "lowest": [0.0] * c["T"], "highest": [1.0] * c["T"]}
        wrong += sum(
            dist_train_indices(c["n"], c["T"], u).tolist() != c[key] for key, u in draws.items()
        )
    yield Check(f"training: wrong of {len(cases['train'])}", wrong, 0)


def check_preprocess(file: Path) -> Iterator[Check]:
    data = np.load(file)
    error = 0.0
    for meta in json.loads(str(data["meta_json"])):
        i, crops = meta["index"], meta["crops"]
        more = {"scale": meta["test_scale"], "style": meta["style"]}
        got = evaluation_floats(data[f"in_{i}"], meta["crop"], crops, **more).transpose(1, 2)
        if f"out_{i}" in data:
            error = max(error, worst(got, data[f"out_{i}"]))
        else:
            error = max(error, worst(got[0, :, 0, ::16], data[f"out_{i}_row"]))
            error = max(error, compact_sums(got, data[f"out_{i}_chk"]))
    yield Check("evaluation crops", error, 1e-6)
    error = 0.0
    for meta in json.loads(str(data["train_json"])):
        draws = meta["draws_in_order"]
        box = next(d[1:] for d in draws if d[0] == "crop_top_left_h_w")
        grey = [d[-1] for d in draws if d[0] == "uniform"][1] < meta["grayscale_p"]
        flip = any(d[1] < 0.5 for d in draws if d[0] == "random")
        draw = FloatDraw(*box, flip_first=flip, grey=grey)
        got = training_floats(data[f"tr_in_{meta['index']}"], meta["size"], draw)
        error = max(error, worst(got.transpose(0, 1), data[f"tr_out_{meta['index']}"]))
    yield Check("training crops", error, 1e-6)
    for name in sorted(n for n in data.files if n.startswith("boxes_")):
        height, width = map(int, name.removeprefix("boxes_").split("x"))
        rng = np.random.default_rng(0)
        ours = np.array([random_part(height, width, rng) for _ in range(40_000)], np.float64)
        distance = box_distance(ours, data[name].astype(np.float64))
        yield Check(f"{name}, distance of distributions", distance, SAME_DISTRIBUTION)
    yield from _check_mixing(data)
    wrong = 0
    for u, cases in json.loads(str(data["flip_json"])).items():
        for before, after, flipped, _ in cases:
            assert flipped == (float(u) < 0.5)
            wrong += (MIRRORED.get(before, before) if flipped else before) != after
    yield Check("labels of mirrored clips that differ", wrong, 0)


def box_distance(ours: Any, theirs: Any) -> float:
    """The largest distance of the distributions of top, left, height, width, area, aspect."""
    distance = 0.0
    for of in (
        *(lambda b, i=i: b[:, i] for i in range(4)),
        lambda b: b[:, 2] * b[:, 3],
        lambda b: b[:, 3] / b[:, 2],
    ):
        a, b = of(ours), of(theirs)
        points = np.union1d(a, b)
        shares = [np.searchsorted(np.sort(v), points, side="right") / len(v) for v in (a, b)]
        distance = max(distance, float(np.abs(shares[0] - shares[1]).max()))
    return distance


def _check_mixing(data: Any) -> Iterator[Check]:
    errors = {"mixed clips": 0.0, "mixed targets": 0.0, "shares": 0.0}
    alphas = {"both": (0.8, 1.0), "mixup": (0.8, 0.0), "cutmix": (0.0, 1.0)}
    for meta in json.loads(str(data["mix_json"])):
        i = meta["index"]
        frames, labels = tensor(data[f"mix_in_{i}"]).float(), tensor(data[f"mix_labels_{i}"])
        mixup, cutmix = alphas[meta["mode"]]
        seeded = np.random.RandomState(meta["numpy_seed"])
        mix = draw_mix(seeded, *frames.shape[-2:], mixup=mixup, cutmix=cutmix)
        assert mix is not None
        expected = data[f"mix_targets_{i}"]
        targets = soft_targets(labels, expected.shape[1], meta["smoothing"], mix)
        for name, error in zip(
            errors,
            (
                worst(mixed(frames, mix), data[f"mix_out_{i}"]),
                worst(targets, expected),
                abs(mix.share - meta.get("lam_used", meta["lam_drawn"])),
            ),
            strict=True,
        ):
            errors[name] = max(errors[name], error)
    smooth = soft_targets(tensor(data["smooth_labels"]), data["smooth_targets"].shape[1], 0.1)
    errors["smoothed targets"] = worst(smooth, data["smooth_targets"])
    for name, error in errors.items():
        yield Check(name, error, 1e-6)


def check_tokens(file: Path) -> Iterator[Check]:
    import open_clip

    data = np.load(file)
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    names = json.loads(str(data["names_json"]))
    wrong = 0
    for k, prefix in enumerate(json.loads(str(data["prefixes_json"]))):
        ours = tokenizer([bare_sentence(name, prefix) for name in names]).numpy()
        wrong += int((ours != data[f"tokens_prefix_{k}"]).sum())
    yield Check("ids that differ", wrong, 0)
