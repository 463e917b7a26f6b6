"""Which encoder a name means, from any working directory."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from pipeline.clip_encoder import load_encoder
from pipeline.encoders.specs import encoder_label, lasting_spec, local_encoder, signature
from tests.support.worlds.tiny_world import make_encoder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, which has an encoder "tiny"; another one is in the workspace."""
    folder = tmp_path / "here"
    make_encoder(folder / "tiny", seed=1)
    make_encoder(tmp_path / "encoders/tiny", seed=2)
    monkeypatch.chdir(folder)
    return folder


def test_a_bare_name_is_the_workspaces(
    here: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="pipeline")
    encoders = tmp_path / "encoders"
    wanted = load_encoder(str(encoders / "tiny")).fingerprint
    assert load_encoder("tiny", encoders_dir=encoders).fingerprint == wanted
    assert signature("tiny", encoders)["spec"] == str(encoders / "tiny")
    assert lasting_spec("tiny", encoders) == encoder_label("tiny", encoders) == "tiny"
    # Said once, with how to name the other.
    (said,) = [text for text in caplog.messages if "./tiny" in text]
    assert str(encoders / "tiny") in said
    assert str(here / "tiny") in said


def test_a_path_is_what_lies_there(here: Path, tmp_path: Path) -> None:
    encoders = tmp_path / "encoders"
    for spec in ("./tiny", "../here/tiny", str(here / "tiny")):
        assert lasting_spec(spec, encoders) == str(here / "tiny")
        assert encoder_label(spec, encoders) == "tiny"
    assert (
        load_encoder("./tiny", encoders_dir=encoders).fingerprint
        == load_encoder("tiny").fingerprint
        != load_encoder("tiny", encoders_dir=encoders).fingerprint
    )


def test_a_name_that_the_workspace_has_not_is_sought_here(
    here: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="pipeline")
    make_encoder(here / "mine")
    assert lasting_spec("mine", tmp_path / "encoders") == str(here / "mine")
    assert local_encoder("mine", None) == Path("mine")
    assert not caplog.messages


def test_names_that_runs_may_have_are_found(tmp_path: Path) -> None:
    """`finetune --name a+b` makes encoders/a+b."""
    make_encoder(tmp_path / "encoders/a+b.v1")
    assert local_encoder("a+b.v1", tmp_path / "encoders") == tmp_path / "encoders/a+b.v1"


def test_nothing_of_that_name(tmp_path: Path) -> None:
    for spec in ("ViT-B-16/openai", "none", "", "~nobody-of-this-name/x"):
        assert local_encoder(spec, tmp_path / "encoders") is None
        assert lasting_spec(spec, tmp_path / "encoders") == spec
