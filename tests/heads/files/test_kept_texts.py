"""Class texts kept in a run's folder: found again by encoder and sentences, and by nothing else."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from heads.files.head_file import save_tensors
from heads.files.kept_texts import KeptTexts


def test_texts_belong_to_an_encoder_and_to_sentences(tmp_path: Path) -> None:
    kept = KeptTexts(tmp_path, "encoder", "sentences")
    assert kept.read(3, 4) is None
    embeddings = torch.randn(3, 4)
    kept.write(embeddings)
    for other in ({"encoder_fingerprint": "another"}, {"sentences_hash": "others"}):
        assert replace(kept, **other).read(3, 4) is None
    replace(kept, sentences_hash="others").write(-embeddings)
    found = kept.read(3, 4)
    assert found is not None
    assert torch.equal(found, embeddings)


@pytest.mark.parametrize(
    ("tensors", "key"),
    [
        ({"embeddings": torch.randn(3, 4)}, "another"),
        ({"embeddings": torch.randn(3, 5)}, None),
        ({"embeddings": torch.randn(3, 4).double()}, None),
        ({"embeddings": torch.full((3, 4), float("nan"))}, None),
        ({"rows": torch.randn(3, 4)}, None),
    ],
)
def test_what_is_not_these_texts_is_made_again(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    tensors: dict[str, torch.Tensor],
    key: str | None,
) -> None:
    kept = KeptTexts(tmp_path, "encoder", "sentences")
    save_tensors(kept.file, tensors, {"key": key or kept.key})
    with caplog.at_level(logging.WARNING):
        assert kept.read(3, 4) is None
    assert "encoded again" in caplog.text
    kept.file.write_bytes(b"no tensors")
    assert kept.read(3, 4) is None
