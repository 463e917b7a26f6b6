"""Published figures: their file keeps its rules; one stands beside ours where protocols agree."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from typing import Any

import pytest

from heads.evaluation.comparing.published import (
    COMPARED,
    PUBLISHED_FILE,
    Published,
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
SURE = {"README", "paper", "log", "third-party notes", "third-party table"}
MEASURES = {"top1", "base", "novel", "harmonic mean", "tradeoff"}
NUMBERS = {"value": (int, float), "top5": (int, float), "std": (int, float), "shots": int}


def test_the_file_keeps_its_rules() -> None:
    value = tomllib.loads(PUBLISHED_FILE.read_text())
    assert set(value) == {"source"}
    kinds = {field.name: NUMBERS.get(field.name, str) for field in fields(Published)}
    kinds |= {"frames": int, "n": list}
    for source in value["source"]:
        for name, entry in [
            *source.items(),
            *(item for f in source["figures"] for item in f.items()),
        ]:
            assert entry, f"{name} is empty: leave out what is not known"
            kind = list if name == "figures" else kinds[name]
            assert isinstance(entry, kind), f"{name} is {entry!r}, not {kind}"
    figures = published_figures()
    told = ("method", *COMPARED, "measure", "trained_on", "source")
    keys = [[getattr(f, name) for name in told] for f in figures if f.measure != "tradeoff"]
    assert [key for key in keys if keys.count(key) > 1] == [], "a figure is there twice"
    assert {figure.method for figure in figures} == {"MoTE", "ViFi-CLIP", "DiST", "MSTA", "TACO"}
    for figure in figures:
        assert figure.sure in SURE
        assert figure.measure in MEASURES
        assert all(
            0 < number <= 100 for number in (figure.value, figure.top5 or 1, figure.std or 1)
        )
        assert re.fullmatch(r"|[1-9]\d?x[1-9]\d?", figure.views), "views are CLIPSxCROPS"
        assert all(type(count) is int and count > 0 for count in figure.n or [])
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


def test_frames_are_those_that_reach_the_tower() -> None:
    """A DiST head takes 16 frames of a view; publications call it by the 8 that CLIP sees."""
    ours = result(
        dataset="k400",
        protocol="closeset",
        protocol_name="k400-closeset-3x1",
        prompt_set="name",
        frames=16,
        kind="dist",
    )
    (longer,) = comparable(ours)
    assert longer.value == 84.4
    (figure,) = comparable({**ours, "tower_frames": 8})
    assert (figure.method, figure.value, figure.top5) == ("DiST", 83.6, 96.3)
    assert nearest({**ours, "tower_frames": 8, "views": "1x1"})[0].figure.value == 83.6


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
    assert architecture("viclip:/w/ViCLIP-B_InternVid-FLT-10M.pth") == "ViCLIP-B/16"
    assert architecture("viclip:ViCLIP-L-14-hf/model.safetensors") == "ViCLIP-L/14"
    assert architecture("viclip:other.pth") is None
    assert architecture("head:vit-b-16-adapted") is None


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
