"""Published figures: their file keeps its rules; one stands beside ours where protocols agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from featstore.errors import UserError
from heads.evaluation.comparing.published import (
    architecture,
    comparable,
    count_note,
    nearest,
    published_figures,
    published_of,
)
from heads.evaluation.protocols.choose import PROTOCOLS
from tests.support.stores.result_files import result

OURS: dict[str, Any] = {"splits": (50.0, 51.0, 52.0)}
GOOD = """
[[source]]
method = "M"
backbone = "ViT-B/16"
trained_on = "Kinetics-400"
protocol = "hmdb51-zeroshot-3splits"
dataset = "hmdb51"
source = "a paper"
sure = "paper"
figures = [{ value = 50.0 }]
"""


def test_the_file_keeps_its_rules() -> None:
    figures = published_figures()
    assert {figure.method for figure in figures} == {"MoTE", "ViFi-CLIP", "DiST", "MSTA"}
    for figure in figures:
        assert figure.protocol in PROTOCOLS or figure.protocol == "tradeoff"
        if figure.protocol in PROTOCOLS and PROTOCOLS[figure.protocol].dataset:
            assert PROTOCOLS[figure.protocol].dataset == figure.dataset
        trains = figure.protocol.endswith(("-fewshot", "-base-to-novel"))
        assert (figure.shots is not None) == trains


def test_the_same_protocol_stands_beside_ours() -> None:
    (figure,) = comparable(result(**OURS))
    assert (figure.method, figure.value, figure.std) == ("MoTE", 55.8, 0.9)
    assert nearest(result(**OURS)) == []
    assert count_note(figure, result(**OURS)) == (
        "1,530 / 1,530 / 1,530 listed, 1,528 / 1,528 / 1,528 evaluated; published: "
        "1,530 / 1,530 / 1,530"
    )
    fewer = result(**OURS)
    fewer["per_split"][1]["n_listed"] = 1529  # another list
    assert comparable(fewer) == []
    assert nearest(fewer)[0].differs == (
        "n: published 1,530 / 1,530 / 1,530, ours 1,530 / 1,529 / 1,530",
    )
    (kinetics,) = comparable(
        result(
            dataset="k400",
            protocol="closeset",
            protocol_name="k400-closeset-3x1",
            prompt_set="name",
        )
    )
    assert (kinetics.method, kinetics.value) == ("DiST", 83.6)
    assert count_note(kinetics, result()).endswith("published: unknown")


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"views": "1x1"}, "views: published 3x1, ours 1x1"),
        ({"frames": 16}, "frames: published 8, ours 16"),
        ({"prompt_set": "name"}, "prompts: published mote28, ours name"),
        ({"fusion": "features"}, "fusion: published softmax, ours features"),
        ({"encoder": "ViT-L-14/openai"}, None),
        ({"encoder": "mine"}, "backbone: published ViT-B/16, ours unknown"),
        ({"protocol_name": "hmdb51-zeroshot-full"}, None),
        ({"protocol_name": None}, None),
    ],
)
def test_another_protocol_is_at_most_near(changes: dict[str, Any], phrase: str | None) -> None:
    ours = result(**OURS, **changes)
    if "encoder" in changes and phrase is None:
        (figure,) = comparable(ours)
        assert figure.value == 61.4  # that backbone has a figure of its own
        return
    assert comparable(ours) == []
    near = nearest(ours)
    assert near
    assert all(one.differs for one in near)
    if phrase is not None:
        assert near[0].figure.value in (55.8, 61.4)
        assert near[0].differs == (phrase,)


def test_an_architecture_that_is_named_wins() -> None:
    assert comparable(result(**OURS, encoder="mine"), "ViT-B/16")[0].value == 55.8
    assert architecture("ViT-B-16/openai") == "ViT-B/16"
    assert architecture("ViT-L-14-quickgelu/dfn2b") == "ViT-L/14"
    assert architecture("/some/where/vit_b_32") == "ViT-B/32"
    assert architecture("RN50/openai") is None


def test_the_figures_of_a_protocol() -> None:
    assert {(f.backbone, f.value) for f in published_of("ssv2-closeset-3x1")} == {
        ("ViT-B/16", 68.7),
        ("ViT-B/16", 70.2),
        ("ViT-B/16", 70.9),
        ("ViT-L/14", 73.1),
    }
    assert published_of("halfclass") == []


def test_a_data_set_nobody_published() -> None:
    ours = result(dataset="my-clips", protocol_name="zeroshot")
    assert comparable(ours) == []
    assert nearest(ours) == []


def test_a_mean_over_seeds_is_no_single_result() -> None:
    ours = result(
        dataset="hmdb51",
        protocol="base-to-novel",
        protocol_name="hmdb51-base-to-novel",
        prompt_set="video",
        shots=16,
    )
    assert comparable(ours, "ViCLIP-B/16") == []
    other = nearest(ours | {"measure": "harmonic mean", "shots": 4}, "ViCLIP-B/16")
    assert other[0].differs[0] == "shots: published 16, ours 4"
    near = nearest(ours | {"measure": "harmonic mean"}, "ViCLIP-B/16")
    assert near[0].figure.value == 66.3
    assert near[0].differs[:2] == (
        "views: published unknown, ours 3x1",
        "fusion: published unknown, ours softmax",
    )


def test_one_view_has_no_fusion_and_shots_must_agree() -> None:
    ours = result(
        dataset="hmdb51",
        protocol="fewshot",
        protocol_name="hmdb51-fewshot",
        views="1x1",
        fusion="features",
        shots=8,
    )
    (figure,) = comparable(ours)
    assert (figure.method, figure.shots, figure.value) == ("MoTE", 8, 67.2)
    (vifi,) = comparable(ours | {"frames": 32, "prompt_set": "name"})
    assert (vifi.method, vifi.value) == ("ViFi-CLIP", 64.5)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("figures = [{ value = 50.0 }]", "", "source 1: it has no figures"),
        ("value = 50.0", "value = 150.0", "accuracies are per cent"),
        ("value = 50.0", 'value = "50"', "value is '50', not a float"),
        ("value = 50.0", "value = 50.0, viws = 1", "unknown fields viws"),
        ("value = 50.0", 'value = 50.0, views = "3 x 1"', "views are CLIPSxCROPS"),
        ("value = 50.0", "value = 50.0, n = [0]", "n are whole numbers above 0"),
        ("value = 50.0", 'value = 50.0, measure = "top3"', "measure must be one of"),
        ("value = 50.0", "value = 50.0, frames = true", "frames is True, not a int"),
        ("value = 50.0 }", "value = 50.0 }, { value = 51.0 }", "is there twice"),
        ('sure = "paper"', 'sure = "rumour"', "sure must be one of"),
        ('source = "a paper"', 'source = ""', "no text is empty"),
        ('source = "a paper"', "", "it lacks source"),
        ("-3splits", "-4splits", "protocol must be one of"),
        ("[[source]]", "[source]", r"must hold \[\[source\]\] tables"),
        ("[[source]]", "[[source", "is no file of published figures"),
    ],
)
def test_a_file_that_breaks_the_rules(tmp_path: Path, old: str, new: str, message: str) -> None:
    good = tmp_path / "good.toml"
    good.write_text(GOOD)
    assert published_figures(good)[0].value == 50.0
    assert old in GOOD
    bad = tmp_path / "bad.toml"
    bad.write_text(GOOD.replace(old, new))
    with pytest.raises(UserError, match=message):
        published_figures(bad)
