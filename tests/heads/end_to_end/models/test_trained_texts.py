"""Class texts whose text tower trains: the numbers, the gradients, chunks and memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from heads.end_to_end import EndToEndModel
from heads.end_to_end.models.trained_texts import TrainedTexts, bytes_kept
from heads.end_to_end.validate import validate
from heads.training.config import TrainConfig
from heads.training.ranks import Ranks
from heads.training.schedule import build_optimizer
from pipeline.clip_encoder import load_encoder
from pipeline.encoders.text_tower import text_embeddings
from pipeline.video_clips.loader import ClipBatch
from tests.support.worlds.tiny_towers import (
    CLASSES,
    DIM,
    DRAW,
    SIZE,
    class_embeddings,
    clips,
    sentences,
    tiny_clip,
    tiny_model,
    tiny_texts,
)
from tests.support.worlds.tiny_world import make_encoder

Gradients = dict[str, Tensor]


def pulled(texts: nn.Module, embeddings: Tensor) -> Gradients:
    """The gradients of a number that depends on every class in its own way."""
    target = torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings)
    texts.zero_grad(set_to_none=True)
    ((embeddings * target).sum() + embeddings.pow(3).sum()).backward()
    return {name: p.grad.clone() for name, p in texts.named_parameters() if p.grad is not None}


def require_close(ours: Gradients, theirs: Gradients) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        close = {"rtol": 0, "atol": 1e-5 * max(float(theirs[name].abs().max()), 1e-3)}
        torch.testing.assert_close(gradient, theirs[name], **close)


@pytest.mark.parametrize("kind", ["vit", "custom", "coca"])
def test_numbers_and_gradients_are_those_of_one_sentence_after_the_other(kind: str) -> None:
    """Over all places of the context, as the model itself encodes texts."""
    clip: Any = tiny_clip(kind)
    texts = tiny_texts(clip, chunk_tokens=20)
    tokens, counts = sentences()
    rows = [functional.normalize(clip.encode_text(row[None]), dim=-1) for row in tokens]
    plain = torch.stack([torch.cat(lines).mean(0) for lines in by_class(rows, counts)])
    plain = functional.normalize(plain, dim=-1)
    ours = texts()
    assert ours.shape == (CLASSES, DIM)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.norm(dim=-1), torch.ones(CLASSES))
    require_close(pulled(texts, ours), pulled(texts, plain))


def by_class(rows: list[Tensor], counts: list[int]) -> Iterator[list[Tensor]]:
    at = iter(rows)
    yield from ([next(at) for _ in range(count)] for count in counts)


def test_places_after_the_end_of_a_text_change_nothing() -> None:
    """So they are left out: nothing looks ahead, and the embedding is read at the end."""
    clip: Any = tiny_clip()
    tokens, _ = sentences()
    other = tokens.clone()
    for row, ends in zip(other, tokens.argmax(1), strict=True):
        row[ends + 1 :] = torch.randint(62, (7 - int(ends),))
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_text(tokens), clip.encode_text(other))
    used = int(tokens.argmax(1).max()) + 1
    assert used < tokens.shape[1]
    seen: list[tuple[int, ...]] = []
    hook = clip.transformer.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    torch.testing.assert_close(text_embeddings(clip, other), clip.encode_text(tokens))
    hook.remove()
    assert [shape[1] for shape in seen] == [used, tokens.shape[1]]


def test_a_chunk_is_as_long_as_its_longest_sentence() -> None:
    clip: Any = tiny_clip()
    texts = tiny_texts(clip, chunk_tokens=14)
    seen: list[tuple[int, int]] = []
    clip.transformer.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[:2]))
    texts()
    lengths = sorted((sentences()[0] > 0).sum(1).tolist())
    assert seen == [
        (len(part), max(part)) for part in (lengths[n : n + 2] for n in range(0, 11, 2))
    ]


@pytest.mark.parametrize("kind", ["vit", "custom"])
def test_chunks_of_every_size_give_the_same(kind: str) -> None:
    whole = tiny_texts(tiny_clip(kind))
    values, gradients = whole(), pulled(whole, whole())
    for chunk_tokens in (1, 14, 30):
        texts = tiny_texts(tiny_clip(kind), chunk_tokens=chunk_tokens)
        torch.testing.assert_close(texts(), values, rtol=0, atol=1e-6)
        require_close(pulled(texts, texts()), gradients)


def kept_of(texts: TrainedTexts) -> int:
    return bytes_kept(texts.forward, texts.parameters())


@pytest.mark.parametrize("kind", ["vit", "custom"])
def test_less_memory_changes_no_bit(kind: str) -> None:
    texts = tiny_texts(tiny_clip(kind), chunk_tokens=14)
    values, gradients, most = texts(), pulled(texts, texts()), kept_of(texts)
    kept = []
    for share in (4.0, 0.7, 0.0):
        texts.keep_within(int(4 * share * most))  # a quarter of it is for texts
        assert texts.kept_bytes <= share * most
        kept.append(kept_of(texts))
        assert torch.equal(texts(), values)
        for name, gradient in pulled(texts, texts()).items():
            assert torch.equal(gradient, gradients[name]), name
    assert kept[0] == most
    assert kept[0] > kept[1] > kept[2]
    assert kept[2] < 0.2 * most


def test_the_memory_of_texts_is_foreseen_and_said() -> None:
    texts = tiny_texts(tiny_clip(), chunk_tokens=14)
    texts.keep_within(10**12)
    assert 0.7 * kept_of(texts) < texts.kept_bytes < 1.3 * kept_of(texts)
    assert texts.words == (
        "7 classes, 11 sentences of up to 7 tokens in 6 chunks: 6 kept for the backward pass "
        f"({texts.kept_bytes / 1e9:.2f} GB, at most 250.00)"
    )
    texts.keep_within(0)
    assert texts.kept_bytes == 0
    assert texts.words.endswith(
        "0 kept for the backward pass (0.00 GB, at most 0.00), 6 computed twice"
    )


def test_a_training_step_moves_both_towers() -> None:
    for head in ("mote", "transformer", "mean"):
        model = tiny_model(head={"kind": head}, train="both-towers")
        frames, labels = clips()
        config = TrainConfig(lr=1e-3, logit_scale_lr_ratio=0.1)
        optimizer = build_optimizer(model.head, model.tower_parameters(), config)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        draw = model.head.draw(torch.Generator().manual_seed(5))
        terms = model.training_loss(frames, labels, class_embeddings(), draw)
        terms.total.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert model.training_loss(frames, labels, class_embeddings(), draw).total < terms.total
        group = optimizer.param_groups[0]
        assert {id(p) for p in model.texts.parameters()} < {id(p) for p in group["params"]}
        assert len({id(p) for p in group["params"]}) == len(group["params"])
        assert group["lr"] == pytest.approx(1e-4)


def test_the_loss_is_that_of_the_texts_as_fixed_ones() -> None:
    model = tiny_model(train="both-towers")
    fixed = tiny_model(train="tower")
    ours = model.training_loss(*clips(), class_embeddings(), DRAW)
    theirs = fixed.training_loss(*clips(), model.texts().detach(), DRAW)
    assert torch.equal(ours.total, theirs.total)
    ours.total.backward()
    theirs.total.backward()
    for name, parameter in fixed.named_parameters():
        assert torch.equal(parameter.grad, model.get_parameter(name).grad), name


def test_mixed_precision_keeps_the_embeddings_in_float32() -> None:
    model = tiny_model(train="both-towers")
    with torch.autocast("cpu", torch.bfloat16):
        texts = model.class_embeddings(class_embeddings())
        terms = model.training_loss(*clips(), class_embeddings(), DRAW)
    assert texts.dtype == torch.float32
    terms.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    cosines = functional.cosine_similarity(texts, model.texts())
    assert cosines.min() > 0.99


def test_the_towers_stay_in_evaluation_mode() -> None:
    model = tiny_model(train="both-towers").train()
    assert model.head.training
    assert not any(m.training for m in (*model.texts.modules(), *model.image_tower.modules()))


def test_texts_belong_to_this_way_of_training() -> None:
    clip: Any = tiny_clip()
    head = tiny_model().head
    with pytest.raises(ValueError, match="train tower needs no texts"):
        EndToEndModel(clip.visual, head, 100.0, texts=tiny_texts(clip))
    with pytest.raises(ValueError, match="train both-towers needs texts"):
        EndToEndModel(clip.visual, head, 100.0, train="both-towers")
    fixed = class_embeddings()
    assert tiny_model().class_embeddings(fixed) is fixed


def test_checkpointing_computes_all_texts_twice() -> None:
    model = tiny_model(train="both-towers", checkpointing=True)
    assert model.texts.words.endswith("1 computed twice")
    model.training_loss(*clips(), class_embeddings(), DRAW).total.backward()
    other = tiny_model(train="both-towers")
    other.training_loss(*clips(), class_embeddings(), DRAW).total.backward()
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter.grad, model.get_parameter(name).grad), name


class OwnTexts(EndToEndModel):
    """A model that has its class texts from elsewhere."""

    def class_embeddings(self, fixed: Tensor) -> Tensor:
        return -fixed


class TwoClips:
    """Stands in for `EvaluationClips`."""

    n_listed = 2

    def batches(self) -> Iterator[ClipBatch]:
        frames, _ = clips(2)
        yield ClipBatch(frames, torch.tensor([0, 1]), torch.arange(2), ("a", "b"), (), 0.0)


def test_a_model_may_have_texts_of_its_own() -> None:
    """One method is all that it overrides: training and evaluation ask it."""
    plain = tiny_model()
    model = OwnTexts(plain.image_tower, plain.head, 100.0)
    own = model.training_loss(*clips(), class_embeddings(), DRAW).total
    assert torch.equal(own, plain.training_loss(*clips(), -class_embeddings(), DRAW).total)
    given: Any = TwoClips()
    how: dict[str, Any] = {"split": "val", "ranks": Ranks(), "batch_size": 2, "in_step": False}
    how |= {"shape": (2, 3, SIZE, SIZE), "modulate": True}
    found, _ = validate(model, given, class_embeddings(), **how)
    assert torch.equal(model.head.training_class_embeddings, -class_embeddings())
    expected, _ = validate(plain, given, -class_embeddings(), **how)
    assert found == expected


def test_an_encoder_gives_the_same_texts(tmp_path: Path) -> None:
    """With 28 sentences a class, of a tokeniser's words."""
    encoder = load_encoder(make_encoder(tmp_path / "tiny"))
    names = ("jump", "brush hair", "climb a very long flight of stairs")
    texts = TrainedTexts(encoder.model, *encoder.class_tokens(names, "mote28"))
    expected = encoder.class_embeddings(names, "mote28")
    torch.testing.assert_close(texts().detach(), expected, rtol=0, atol=1e-6)
    assert "3 classes, 84 sentences" in texts.words
