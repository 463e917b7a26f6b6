"""Wherever a name is chosen from a known list, a near one is suggested before the choices."""

from __future__ import annotations

import pytest

from tests.support.processes.command_line import refused
from tests.support.worlds.tiny_world import World


@pytest.mark.parametrize(
    ("words", "near"),
    [
        ("train-head --dataset clips --device gpu", "did you mean cuda?"),
        ("train-head --dataset clips --recipe frozen_store", "did you mean frozen-store?"),
        ("train-head --dataset clips --split trian", "did you mean train?"),
        ("train-head --dataset clips --prompts mote82", "did you mean mote28?"),
        ("train-head --dataset clips --head mot", "did you mean mote?"),
        ("train-head --dataset clips --classes bse", "did you mean base?"),
        ("train-head --dataset clps", ": did you mean clips? it has clips"),
        ("eval --closeset clips --head clip-mote", "did you mean clips-mote or"),
        ("eval --closeset clips --fusion softmx", "did you mean softmax?"),
        ("eval --closeset clips --sweep ensembel=0,1", "did you mean ensemble?"),
        ("eval --protocol hmdb51-zeroshot-3split", "did you mean hmdb51-zeroshot-3splits"),
        ("extract --dataset clps", "(not packed): did you mean clips?"),
        ("extract --dataset clips --split vall", "did you mean val?"),
        ("extract --dataset clips --sampling unifrm:8", "did you mean uniform?"),
        ("extract --dataset clips --tier embedings", "did you mean embeddings?"),
        ("extract --dataset clips --decoder pyva", "did you mean pyav?"),
        ("extract --dataset clips --engine rya", "did you mean ray?"),
        ("extract --dataset clips --encoder openai/clip-vit-base-patch16", "ViT-B-16/openai?"),
        ("export clips-mote --format onx --out x.onnx", "did you mean onnx?"),
        ("protocols show closest", "did you mean closeset?"),
        ("inspect clps", "did you mean clips?"),
        ("rm head clips-mot", "did you mean clips-mote"),
        ("evl --closeset clips", "Did you mean 'eval'"),
    ],
)
def test_a_near_name_is_suggested(world: World, words: str, near: str) -> None:
    root = () if words.startswith(("protocols", "evl")) else ("--root", world.root)
    error = refused(2, *words.split(), *root)
    assert near in error
    assert "pack --dataset" not in error  # one remedy, the likely one
