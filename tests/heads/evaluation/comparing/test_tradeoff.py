"""Composite scores against the published ones, and the newest results of several heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featstore.errors import UserError
from featstore.files.durable import write_json
from heads.evaluation.comparing.published import published_figures
from heads.evaluation.comparing.tradeoff import collect, harmonic_mean
from tests.support.stores.result_files import write_result

ZEROSHOT = ("ucf101", "hmdb51", "k600")


@pytest.mark.parametrize(
    ("backbone", "closesets", "mean", "scores"),
    [
        ("ViT-B/16", (83.0, 81.8), 67.9, (74.7, 74.2)),
        ("ViT-L/14", (86.8,), 74.4, (80.1,)),
    ],
)
def test_the_published_composite_scores(
    backbone: str, closesets: tuple[float, ...], mean: float, scores: tuple[float, ...]
) -> None:
    figures = [f for f in published_figures() if (f.method, f.backbone) == ("MoTE", backbone)]
    top1 = [
        next(f.value for f in figures if f.dataset == name and "zeroshot" in f.protocol)
        for name in ZEROSHOT
    ]
    assert round(harmonic_mean(top1), 1) == mean
    assert (
        tuple(round(harmonic_mean([close, harmonic_mean(top1)]), 1) for close in closesets)
        == scores
    )
    composite = {f.value for f in figures if f.protocol == "tradeoff" and f.frames == 8}
    assert composite == {mean, *scores}


def test_the_other_published_pairs() -> None:
    assert round(harmonic_mean([87.2, 74.8]), 1) == 80.5  # MoTE, 16 frames
    assert round(harmonic_mean([86.9, 68.1]), 1) == 76.4  # DiST as MoTE's authors ran it
    assert round(harmonic_mean([74.9, 57.5, 75.0]), 1) == 68.1


def test_rounding_comes_last() -> None:
    zeroshot = (74.94, 69.86, 81.14)
    assert round(harmonic_mean([75.34, harmonic_mean(zeroshot)]), 1) == 75.2
    early = harmonic_mean([round(value, 1) for value in zeroshot])
    assert round(harmonic_mean([round(75.34, 1), round(early, 1)]), 1) == 75.1


@given(st.lists(st.floats(0, 100), min_size=1, max_size=5))
def test_a_harmonic_mean_lies_between(values: list[float]) -> None:
    mean = harmonic_mean(values)
    assert min(values) - 1e-9 <= mean <= max(values) + 1e-9
    assert mean <= sum(values) / len(values) + 1e-9
    if 0.0 in values:
        assert mean == 0.0


@pytest.mark.parametrize("values", [[], [-1.0], [101.0], [float("nan")]])
def test_what_has_no_harmonic_mean(values: list[float]) -> None:
    with pytest.raises(UserError, match="is not defined"):
        harmonic_mean(values)


def closeset(run: Path, top1: float, time: int = 0, **changes: Any) -> Path:
    known = {
        "dataset": "k400",
        "protocol": "closeset",
        "protocol_name": "k400-closeset-4x3",
        "views": "4x3",
        "head": run.name,
    }
    name = f"close{time}-{changes.get('modulate', True)}.json"
    return write_result(run / "eval" / name, time, splits=(top1,), **(known | changes))


def zeroshot(run: Path, dataset: str, top1: float, time: int = 0, **changes: Any) -> Path:
    known = {"dataset": dataset, "protocol_name": f"{dataset}-zeroshot-3splits", "head": run.name}
    name = f"{dataset}{time}-{changes.get('modulate', True)}.json"
    return write_result(run / "eval" / name, time, splits=(top1,), **(known | changes))


def whole(run: Path, close: float, *zero: float, **changes: Any) -> Path:
    closeset(run, close, **changes)
    for name, top1 in zip(ZEROSHOT, zero, strict=True):
        zeroshot(run, name, top1, **changes)
    return run


def test_the_table_of_two_heads(tmp_path: Path) -> None:
    runs = [whole(tmp_path / "b16", 83.0, 83.4, 55.8, 70.2)]
    runs += [whole(tmp_path / "l14", 86.8, 88.7, 61.4, 78.4, head_fingerprint="f2f2")]
    table = collect(runs)
    assert (table.closeset, table.zeroshot, table.missing, table.mixed) == (
        "k400",
        ZEROSHOT,
        (),
        (),
    )
    scores = [(row.head, round(row.zeroshot_top1 or 0, 1), round(row.score or 0, 1))
              for row in table.rows]  # fmt: skip
    assert scores == [("b16", 67.9, 74.7), ("l14", 74.4, 80.1)]
    chosen = collect(runs, zeroshot=["hmdb51"])
    assert chosen.rows[0].score == pytest.approx(2 * 83.0 * 55.8 / (83.0 + 55.8))
    assert collect(runs, closeset="k400-closeset-4x3").rows == table.rows


def test_other_prompts_are_a_row_of_their_own(tmp_path: Path) -> None:
    """A newer result with other sentences does not replace the one with the head's own."""
    run = whole(tmp_path / "b16", 80.0, 80.0, 50.0, 60.0)
    zeroshot(run, "hmdb51", 10.0, time=5, prompt_set="mine")
    (row,) = collect([run]).rows
    assert row.top1[2] == 50.0
    (run / "config.json").write_text('{"data": {"prompt_set": "mine"}}')
    table = collect([run], zeroshot=["ucf101"])
    assert [row.setting.text for row in table.rows if row.complete] == ["on, prompts mote28"]
    whole(run, 70.0, 60.0, 40.0, 50.0, time=9, prompt_set="mine")
    assert [row.setting.text for row in collect([run]).rows] == ["on", "on, prompts mote28"]


def test_results_of_training_videos_are_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = whole(tmp_path / "b16", 80.0, 80.0, 50.0, 60.0)
    closeset(run, 99.0, time=5, n_trained_on=12)
    (row,) = collect([run]).rows
    assert row.top1[0] == 80.0
    assert "close5-True.json tests 12 videos that its head was trained on" in caplog.text


def test_the_newest_result_counts_and_modulation_is_a_row(tmp_path: Path) -> None:
    run = whole(tmp_path / "b16", 80.0, 80.0, 50.0, 60.0)
    zeroshot(run, "hmdb51", 55.8, time=5)
    whole(run, 79.0, 70.0, 40.0, 50.0, modulate=False)
    off, on = collect([run]).rows
    assert (off.setting.modulated, on.setting.modulated) == (False, True)
    assert on.top1[2] == 55.8
    assert off.top1[0] == 79.0


def test_sweeps_leave_no_gaps_and_are_not_mixed_in(tmp_path: Path) -> None:
    run = whole(tmp_path / "b16", 83.0, 83.4, 55.8, 70.2)
    zeroshot(run, "hmdb51", 58.0, time=7, ensemble=0.5)
    zeroshot(run, "hmdb51", 57.0, time=8, modulation_temperature=0.1)
    zeroshot(run, "hmdb51", 56.0, time=9, fusion="features")
    table = collect([run])
    (row,) = table.rows
    assert (row.setting.text, row.top1[2]) == ("on", 55.8)
    assert table.missing == ()
    for name in ("ucf101", "k600"):
        zeroshot(run, name, 80.0, time=7, ensemble=0.5)
    closeset(run, 84.0, time=7, ensemble=0.5)
    plain, mixed = collect([run]).rows
    assert (plain.setting.text, mixed.setting.text) == ("on", "on, ensemble 0.5")
    assert mixed.setting.options == " --ensemble 0.5"
    assert mixed.to_json()["setting"] == "on, ensemble 0.5"


def test_what_is_missing_comes_with_its_command(tmp_path: Path) -> None:
    run = whole(tmp_path / "b16", 83.0, 83.4, 55.8, 70.2)
    closeset(tmp_path / "part", 80.0)
    zeroshot(tmp_path / "part", "ucf101", 80.0)
    table = collect([run, tmp_path / "part"])
    assert [row.complete for row in table.rows] == [True, False]
    assert table.rows[1].score is None
    assert table.missing == (
        "part has no zeroshot result on hmdb51: `mote-cli eval --zeroshot hmdb51 --head part`",
        "part has no zeroshot result on k600: `mote-cli eval --zeroshot k600 --head part`",
    )
    with pytest.raises(UserError, match="no head has a result on every set: part has no zeroshot"):
        collect([tmp_path / "part"], held=["hmdb51", "clips"])
    assert collect([tmp_path / "part"]).zeroshot == ("ucf101",)  # nothing else is here
    with pytest.raises(UserError, match="no head has results"):
        collect([])
    with pytest.raises(UserError, match="--protocol hmdb51-halfclass-full --head b16"):
        collect([run], zeroshot=["hmdb51-halfclass-full"])


def test_other_protocols_are_not_mixed_silently(tmp_path: Path) -> None:
    runs = [whole(tmp_path / "a", 83.0, 83.4, 55.8, 70.2)]
    runs += [whole(tmp_path / "b", 83.0, 83.4, 55.8, 70.2)]
    zeroshot(runs[1], "hmdb51", 57.0, time=9, views="1x1")
    with pytest.raises(UserError, match="on hmdb51, views is 3x1 for a and 1x1 for b"):
        collect(runs)
    table = collect(runs, allow_mixed=True)
    assert table.mixed == ("on hmdb51, views is 3x1 for a and 1x1 for b",)
    assert len(table.rows) == 2
    zeroshot(runs[1], "hmdb51", 57.0, time=10, epoch_choice="best on the test set")
    with pytest.raises(UserError, match="epoch_choice is last for a and best on the test set"):
        collect(runs)
    # What a head is of may differ: that is what the table compares.
    zeroshot(runs[1], "hmdb51", 57.0, time=11, encoder="x", precision="bf16")
    assert collect(runs).mixed == collect(runs).unknown == ()
    zeroshot(runs[1], "hmdb51", 57.0, time=12, sampler=None)
    assert collect(runs).unknown == ("on hmdb51, not every result says sampler",)


def test_plain_and_rephrased_names_never_share_a_table_silently(tmp_path: Path) -> None:
    runs = [whole(tmp_path / "a", 83.0, 83.4, 55.8, 70.2)]
    runs += [whole(tmp_path / "b", 83.0, 83.4, 55.8, 70.2)]
    zeroshot(runs[1], "hmdb51", 60.0, time=9, class_names_as="rephrased")
    with pytest.raises(
        UserError, match="on hmdb51, class_names_as is plain for a and rephrased for b"
    ):
        collect(runs)
    assert collect(runs, allow_mixed=True).mixed


def test_a_projection_and_weights_that_were_asked_for_are_rows(tmp_path: Path) -> None:
    run = tmp_path / "a"
    own = {"kind": "taco", "weights": "mean", "modulate": False}
    closeset(run, 80.0, projection="on", **own)
    closeset(run, 79.0, 1, projection="off", **own)
    for name in ZEROSHOT:
        zeroshot(run, name, 50.0, projection="off", **own)
    (row,) = collect([run]).rows
    assert (row.setting.text, row.top1) == ("off", [80.0, 50.0, 50.0, 50.0])
    for name in ZEROSHOT:
        zeroshot(run, name, 40.0, 1, projection="on", **own)
    assert len(collect([run]).rows) == 1  # the other two are each of one column
    teacher = {**own, "weights": "teacher", "head_fingerprint": "f2f2"}
    closeset(run, 70.0, 2, projection="on", **teacher)
    for name in ZEROSHOT:
        zeroshot(run, name, 60.0, 2, projection="off", **teacher)
    with pytest.raises(UserError, match="weights is mean for a and teacher for a"):
        collect([run])
    rows = collect([run], allow_mixed=True).rows
    assert [row.setting.text for row in rows] == ["off", "off, weights teacher"]
    assert rows[1].setting.options == " --no-modulate --weights teacher"


def test_a_row_is_of_one_model(tmp_path: Path) -> None:
    run = whole(tmp_path / "a", 83.0, 83.4, 55.8, 70.2)
    zeroshot(run, "ucf101", 84.0, time=3, head_fingerprint="trained anew")
    with pytest.raises(UserError, match=r"head_fingerprint is f1f1 in close.* in ucf101"):
        collect([run])


def test_which_sets_are_meant(tmp_path: Path) -> None:
    run = tmp_path / "a"
    closeset(run, 80.0, dataset="clips", protocol_name="closeset")
    zeroshot(run, "other", 60.0)
    zeroshot(run, "more", 30.0)
    table = collect([run])
    assert (table.closeset, table.zeroshot) == ("clips", ("more", "other"))
    assert table.rows[0].zeroshot_top1 == pytest.approx(40.0)
    closeset(run, 80.0, time=1, dataset="clips2", protocol_name="closeset")
    with pytest.raises(UserError, match="close-set results on clips, clips2: choose one"):
        collect([run])
    with pytest.raises(UserError, match="'more' is named twice"):
        collect([run], closeset="clips", zeroshot=["more", "more"])


def test_without_results_the_sets_of_the_workspace_are_meant(tmp_path: Path) -> None:
    run = tmp_path / "a"
    write_json(run / "config.json", {"data": {"dataset": "clips"}})
    held = ["clips", "more", "other"]
    with pytest.raises(UserError) as caught:
        collect([run], held=held)
    assert "a has no closeset result on clips: `mote-cli eval --closeset clips" in str(caught.value)
    assert "`mote-cli eval --zeroshot more --head a" in str(caught.value)
    assert "`mote-cli eval --zeroshot other --head a" in str(caught.value)
    assert "hmdb51" not in str(caught.value)
    with pytest.raises(UserError, match="--zeroshot hmdb51") as caught:
        collect([run], held=[*held, "hmdb51"])  # one of the paper's is enough to mean those
    assert "--zeroshot more" not in str(caught.value)
    closeset(run, 80.0, dataset="clips", protocol_name="closeset")
    with pytest.raises(UserError, match="nothing here has other classes than clips: name a data"):
        collect([run], held=["clips"])
    write_json(tmp_path / "b" / "config.json", {"data": {"dataset": "more"}})
    write_json(tmp_path / "c" / "config.json", {"data": {"dataset": "clips"}})
    with pytest.raises(UserError, match="heads were trained on clips, more: choose one with --cl"):
        collect([tmp_path / "b", tmp_path / "c"], held=held)


def clip_alone(run: Path, close: float, *zero: float, **changes: Any) -> Path:
    plain = {"modulate": False, "kind": "mean", "trained_on": None, "epoch_choice": None}
    return whole(run, close, *zero, **(plain | {"head_fingerprint": "m"} | changes))


def test_the_baseline_is_the_mean_of_the_same_frames(tmp_path: Path) -> None:
    mote = whole(tmp_path / "mote", 83.0, 83.4, 55.8, 70.2)
    mean = clip_alone(tmp_path / "mean", 60.0, 70.0, 40.0, 50.0)
    table = collect([mote], baseline=mean)
    (row,) = table.baselines
    assert row.top1 == [60.0, 70.0, 40.0, 50.0]
    assert table.missing == ()
    assert table.to_json()["baselines"][0]["closeset_top1"] == 60.0
    # Named or found among the heads, it has that row alone; without heads it is one itself.
    assert [row.head for row in collect([mean, mote], baseline=mean).rows] == ["mote"]
    alone = collect([mean], baseline=mean)
    assert ([row.head for row in alone.rows], alone.baselines) == (["mean"], ())
    # Other frames, another store, an ensemble, or other sentences are not that baseline.
    for time, trick in enumerate(
        ({"frames": 16}, {"store": "t.zarr"}, {"ensemble": 0.5}, {"prompt_set": "mine"}), start=1
    ):
        zeroshot(mean, "hmdb51", 99.0, time=time, kind="mean", modulate=False, **trick)
    assert collect([mote], baseline=mean).baselines == (row,)


def test_a_missing_baseline_comes_with_its_command(tmp_path: Path) -> None:
    mote = whole(tmp_path / "mote", 83.0, 83.4, 55.8, 70.2)
    mean = tmp_path / "mean"
    zeroshot(mean, "ucf101", 70.0, kind="mean", modulate=False)
    table = collect([mote], baseline=mean, root_option=" --root here")
    assert table.baselines[0].top1 == [None, 70.0, None, None]
    options = "--head mean --frames 8 --store s.zarr --prompts mote28 --root here`"
    assert table.missing == tuple(
        f"CLIP's mean of the same frames has no {role} result on {name}: "
        f"`mote-cli eval --{role} {name} {options}"
        for role, name in (("closeset", "k400"), ("zeroshot", "hmdb51"), ("zeroshot", "k600"))
    )


def test_heads_of_other_stores_have_their_own_baselines(tmp_path: Path) -> None:
    small = whole(tmp_path / "b16", 83.0, 83.4, 55.8, 70.2)
    large = whole(tmp_path / "l14", 86.8, 88.7, 61.4, 78.4, store="l.zarr", head_fingerprint="f2")
    part = tmp_path / "part"
    closeset(part, 80.0)
    mean = clip_alone(tmp_path / "mean", 60.0, 70.0, 40.0, 50.0)
    clip_alone(mean, 61.0, 71.0, 41.0, 51.0, store="l.zarr", time=1)
    first, second = collect([small, part, large], baseline=mean).baselines
    assert (first.beside, second.beside) == (("b16",), ("l14",))
    assert (first.top1[0], second.top1[0]) == (60.0, 61.0)


def test_the_mean_of_adapted_features_is_no_baseline(tmp_path: Path) -> None:
    own = whole(tmp_path / "fine", 83.0, 83.4, 55.8, 70.2, kind="msta", modulate=False)
    table = collect([own], baseline=tmp_path / "mean")
    assert ([row.head for row in table.rows], table.baselines) == (["fine"], ())
    assert table.missing == ()


def test_a_head_without_new_classes_has_a_closeset_number_alone(tmp_path: Path) -> None:
    mote = whole(tmp_path / "mote", 83.0, 83.4, 55.8, 70.2)
    linear = tmp_path / "linear"
    closeset(linear, 81.0, kind="linear", modulate=False)
    table = collect([mote, linear])
    assert table.rows[1].top1 == [81.0, None, None, None]
    assert table.missing == ("linear knows only its own classes: it has no zero-shot result",)
    closeset(linear, 85.0, time=1, kind="linear", modulate=False, views="1x1")
    with pytest.raises(UserError, match="on k400, views is 4x3 for mote and 1x1 for linear"):
        collect([mote, linear])
