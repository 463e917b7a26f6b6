"""The released checkpoint format: what goes in comes out, and what is something else is refused."""

from __future__ import annotations

import io
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore import UserError
from heads import (
    HeadConfig,
    build_head,
    import_official_checkpoint,
    official_checkpoint,
    save_official_checkpoint,
)
from tests.support.golden.checks import worst
from tests.support.golden.end_to_end import GoldenRun
from tests.support.golden.head import golden_entries, golden_head

HEADS = ["head_0", "head_1", "head_2", "head_3"]
Checkpoint = dict[str, Any]


def tower(dim: int, width: int = 12, layers: int = 2, patch: int = 4, side: int = 3) -> Checkpoint:
    """A random image tower in OpenAI's names."""
    generator = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (1 + side * side, width),
        "visual.proj": (width, dim),
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.ln_pre.weight": (width,),
        "visual.ln_pre.bias": (width,),
        "visual.ln_post.weight": (width,),
        "visual.ln_post.bias": (width,),
    }
    for layer in range(layers):
        block = f"visual.transformer.resblocks.{layer}."
        for name, shape in (
            ("attn.in_proj", (3 * width, width)),
            ("attn.out_proj.", (width, width)),
            ("mlp.c_fc.", (4 * width, width)),
            ("mlp.c_proj.", (width, 4 * width)),
            ("ln_1.", (width,)),
            ("ln_2.", (width,)),
        ):
            joint = "_" if name == "attn.in_proj" else ""
            shapes[f"{block}{name}{joint}weight"] = shape
            shapes[f"{block}{name}{joint}bias"] = shape[:1]
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def checkpoint(layers: int = 2, experts: int = 3, dim: int = 8, classes: int = 6) -> Checkpoint:
    """A random checkpoint made by our own export."""
    config = HeadConfig(dim=dim, layers=layers, experts=experts)
    head = build_head(config, torch.eye(classes, dim), generator=torch.Generator().manual_seed(0))
    return official_checkpoint(head, tower(dim), epoch=29)


def fusion(found: Checkpoint) -> Checkpoint:
    entries: Checkpoint = found["fusion_model_state_dict"]
    return entries


@pytest.mark.parametrize("name", HEADS)
def test_golden_heads_come_in_and_go_out(golden: Path, name: str) -> None:
    """The authors' own state dicts, of any size, with fusion weights of any value."""
    data = np.load(golden / f"{name}.npz")
    entries = golden_entries(data, "param/")
    dim = entries["spe_cls_feature"].shape[1]
    source = {
        "epoch": 3,
        "model_state_dict": tower(dim),
        "fusion_model_state_dict": entries,
        "optimizer_state_dict": {"state": {}, "param_groups": []},
    }
    imported = import_official_checkpoint(source, attention_heads=int(data["n_heads"]))
    ours = golden_head(data, torch.float32)
    state = imported.head.state_dict()
    for key, value in ours.state_dict().items():
        assert key == "logit_scale" or torch.equal(state[key], value), key
    with torch.no_grad():
        cosines = imported.head(torch.from_numpy(data["x"]), torch.from_numpy(data["gen_cls"]))
    assert worst(cosines, data["logits_eval_f32"]) <= 1e-6
    assert imported.epoch == 3
    assert imported.logit_scale == pytest.approx(
        float(source["model_state_dict"]["logit_scale"].exp())  # type: ignore[index]
    )
    back = official_checkpoint(imported.head, imported.tower_state, imported.epoch)
    assert fusion(back).keys() == entries.keys()
    assert all(torch.equal(fusion(back)[key], value) for key, value in entries.items())


def test_the_golden_file_comes_back_to_the_bit(golden: Path, tmp_path: Path) -> None:
    run = GoldenRun(golden / "e2e", tmp_path)
    original = torch.load(run.checkpoint, weights_only=True)
    imported = import_official_checkpoint(run.checkpoint)
    file = tmp_path / "back.pt"
    save_official_checkpoint(file, imported.head, imported.tower_state, imported.epoch)
    back = torch.load(file, weights_only=True)
    assert list(back) == ["epoch", "model_state_dict", "fusion_model_state_dict"]
    assert back["epoch"] == original["epoch"]
    for part in ("model_state_dict", "fusion_model_state_dict"):
        assert type(back[part]) is type(original[part])
        assert back[part].keys() == original[part].keys()
        for name, value in original[part].items():
            assert back[part][name].dtype == value.dtype
            assert torch.equal(back[part][name], value), name
    assert file.stat().st_size < run.checkpoint.stat().st_size * 1.1  # experts are not views


@settings(max_examples=20, deadline=None)
@given(
    layers=st.integers(1, 3),
    experts=st.integers(1, 5),
    dim=st.sampled_from([1, 8, 12, 96]),
    classes=st.integers(1, 9),
    prefix=st.sampled_from(["", "module."]),
)
def test_any_size_round_trips(
    layers: int, experts: int, dim: int, classes: int, prefix: str
) -> None:
    source = checkpoint(layers, experts, dim, classes)
    for part in ("model_state_dict", "fusion_model_state_dict"):
        source[part] = {prefix + name: value for name, value in source[part].items()}
    imported = import_official_checkpoint(source)
    config = imported.head.config
    assert (config.dim, config.layers, config.experts) == (dim, layers, experts)
    assert config.attention_heads == max(1, dim // 64)
    assert not imported.head.training
    back = official_checkpoint(imported.head, imported.tower_state, imported.epoch)
    for part in ("model_state_dict", "fusion_model_state_dict"):
        for name, value in back[part].items():
            assert torch.equal(value, source[part][prefix + name])


def test_attention_heads() -> None:
    source = checkpoint(dim=12)
    assert import_official_checkpoint(source, attention_heads=3).head.config.attention_heads == 3
    with pytest.raises(UserError, match="5 attention heads do not divide"):
        import_official_checkpoint(source, attention_heads=5)
    wide = checkpoint(layers=1, experts=1, dim=160)  # 160 // 64 = 2
    assert import_official_checkpoint(wide).head.config.attention_heads == 2


def test_blending() -> None:
    source = checkpoint()
    original = {name: torch.zeros_like(value) for name, value in tower(8).items()}
    original["token_embedding.weight"] = torch.ones(3, 3)  # of the text tower: not looked at
    for blend in (0.99, 0.5, 0.0, 1.0):
        imported = import_official_checkpoint(source, original, blend)
        for name, value in source["model_state_dict"].items():
            assert torch.allclose(imported.tower_state[name], blend * value)
        assert imported.logit_scale == pytest.approx(
            float(imported.tower_state["logit_scale"].exp())
        )
        assert float(imported.head.logit_scale) == float(imported.tower_state["logit_scale"])
    untouched = import_official_checkpoint(source).tower_state
    assert all(torch.equal(untouched[n], v) for n, v in source["model_state_dict"].items())
    with pytest.raises(UserError, match=r"blend 1\.5 is no share"):
        import_official_checkpoint(source, original, 1.5)
    with pytest.raises(UserError, match=r"original CLIP .*visual\.proj is missing"):
        import_official_checkpoint(source, {n: v for n, v in original.items() if "proj" not in n})
    with pytest.raises(UserError, match=r"original CLIP .*visual\.class_embedding is \[16\]"):
        import_official_checkpoint(source, tower(8, width=16))


def test_a_clip_that_the_tower_was_not_tuned_from_is_told(
    golden: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = GoldenRun(golden / "e2e", tmp_path)
    import_official_checkpoint(run.checkpoint, run.clip_state)
    assert not caplog.records
    generator = torch.Generator().manual_seed(0)
    other = {
        name: torch.randn(value.shape, generator=generator)
        for name, value in run.clip_state.items()
    }
    import_official_checkpoint(run.checkpoint, other)
    assert "hardly agree (cosine" in caplog.text


LAYER = "transformer.resblocks.1."


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("fusion_model_state_dict", "spe_cls_feature"),
        ("fusion_model_state_dict", "frame_position_embeddings.weight"),
        ("fusion_model_state_dict", LAYER + "mlp.mote_fusion_weight"),
        ("fusion_model_state_dict", LAYER + "mlp.fc_up.2.weight"),
        ("fusion_model_state_dict", LAYER + "mlp.fc_dn.0.bias"),
        ("fusion_model_state_dict", LAYER + "attn.in_proj_weight"),
        ("fusion_model_state_dict", LAYER + "ln_1.weight"),
        ("model_state_dict", "logit_scale"),
        ("model_state_dict", "visual.proj"),
        ("model_state_dict", "visual.conv1.weight"),
        ("model_state_dict", "visual.positional_embedding"),
        ("model_state_dict", "visual.transformer.resblocks.1.mlp.c_fc.bias"),
        ("model_state_dict", "visual.ln_post.weight"),
    ],
)
def test_a_missing_misshapen_or_infinite_tensor_is_named(part: str, name: str) -> None:
    whole = checkpoint()
    value = whole[part][name]

    def refused(entries: Checkpoint) -> str:
        with pytest.raises(UserError) as caught:
            import_official_checkpoint({**whole, part: entries})
        message = str(caught.value)
        assert "\n" not in message
        assert name in message
        return message

    refused({key: tensor for key, tensor in whole[part].items() if key != name})
    refused({**whole[part], name: torch.zeros(2, *value.shape)})
    if value.ndim:
        message = refused({**whole[part], name: torch.cat([value, value[..., :1]], dim=-1)})
        assert message.count(" is [") <= 3
    for number in (float("nan"), float("inf")):
        broken = value.clone()
        broken.view(-1)[-1] = number
        assert "NaN or infinity" in refused({**whole[part], name: broken})
    for other in (3.0, "text", value.to_sparse() if value.ndim else None, value.long()):
        assert "is not a tensor of numbers" in refused({**whole[part], name: other})
    assert "is there twice" in refused({**whole[part], f"module.{name}": value})


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("fusion_model_state_dict", "transformer.resblocks.0.mlp.c_fc.weight"),
        ("fusion_model_state_dict", "transformer.ln_final.weight"),
        ("fusion_model_state_dict", "lstm.weight"),
        ("fusion_model_state_dict", LAYER + "mlp.fc_up.3.weight"),
        ("fusion_model_state_dict", "transformer.resblocks.2.ln_1.weight"),
        ("model_state_dict", "visual.attnpool.weight"),
        ("model_state_dict", "transformer.resblocks.0.ln_1.weight"),
    ],
)
def test_an_extra_tensor_is_named(part: str, name: str) -> None:
    whole = checkpoint()
    with pytest.raises(UserError, match=f"{re.escape(name)} is extra"):
        import_official_checkpoint({**whole, part: {**whole[part], name: torch.zeros(8)}})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.pop("fusion_model_state_dict"), "lacks fusion_model_state_dict"),
        (lambda c: c.pop("epoch"), "lacks epoch"),
        (lambda c: c.update(epoch="last"), "says epoch 'last'"),
        (lambda c: c.update(epoch=-1), "says epoch -1"),
        (lambda c: c.update(model_state_dict=[1]), "model_state_dict is a list"),
        (lambda c: c.update(fusion_model_state_dict={}), "has no tensor such as spe_cls_feature"),
        (
            lambda c: c.update(
                fusion_model_state_dict=fusion(c)
                | {"transformer.resblocks.9999.ln_1.weight": torch.zeros(8)}
            ),
            "resblocks.9999.ln_1.weight is extra",
        ),
    ],
)
def test_another_methods_checkpoint(change: Callable[[Checkpoint], Any], reason: str) -> None:
    source = checkpoint()
    change(source)
    with pytest.raises(UserError, match=reason):
        import_official_checkpoint(source)


def test_a_head_without_experts_is_another_method() -> None:
    """Text4Vis, from whose code MoTE's was made, saves the same two state dicts."""
    source = checkpoint()
    block = "transformer.resblocks.0."
    source["fusion_model_state_dict"] = {
        "frame_position_embeddings.weight": torch.zeros(77, 8),
        f"{block}ln_1.weight": torch.ones(8),
        f"{block}mlp.c_fc.weight": torch.zeros(32, 8),
    }
    with pytest.raises(UserError, match="spe_cls_feature is missing"):
        import_official_checkpoint(source)


def test_a_tensor_that_repeats_a_few_numbers_is_refused() -> None:
    """A small file could ask for any amount of memory."""
    source = checkpoint()
    fusion(source)["spe_cls_feature"] = torch.zeros(1, 8).expand(10**12, 8)
    with pytest.raises(UserError, match="spe_cls_feature is not a tensor of numbers"):
        import_official_checkpoint(source)


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Code:
    """What a pickle can make its reader do."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("old_format", [False, True])
def test_code_is_refused_and_not_run(tmp_path: Path, old_format: bool) -> None:
    file, target = tmp_path / "evil.pt", tmp_path / "made by the pickle"
    torch.save(
        {**checkpoint(), "optimizer_state_dict": Code(target)},
        file,
        _use_new_zipfile_serialization=not old_format,
    )
    with pytest.raises(
        UserError, match=r"holds code \(posix\.mkdir\), .*nothing of it was run"
    ) as e:
        import_official_checkpoint(file)
    assert "weights_only" not in str(e.value)  # torch advises to allow it
    assert not target.exists()


def test_both_formats_of_torch_are_read(tmp_path: Path) -> None:
    for new in (True, False):
        torch.save(checkpoint(), tmp_path / "c.pt", _use_new_zipfile_serialization=new)
        assert import_official_checkpoint(str(tmp_path / "c.pt")).epoch == 29


def test_damaged_files_are_told(tmp_path: Path) -> None:
    file = tmp_path / "c.pt"
    data = saved(checkpoint())
    for length in (0, 10, 1000, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(UserError, match="cut off, damaged or of another kind"):
            import_official_checkpoint(file)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
    flipped = bytearray(data)
    flipped[record.header_offset + 200] ^= 0xFF
    file.write_bytes(flipped)
    with pytest.raises(UserError, match=r"is damaged at|cut off, damaged"):
        import_official_checkpoint(file)


def test_other_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        import_official_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(UserError, match="is a folder"):
        import_official_checkpoint(tmp_path)
    file = tmp_path / "c.pt"
    file.write_bytes(saved(torch.zeros(3)))
    with pytest.raises(UserError, match="holds a Tensor, not a checkpoint"):
        import_official_checkpoint(file)
    file.write_text("<html>quota exceeded</html>")
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        import_official_checkpoint(file)


def test_a_head_of_our_own_goes_out_and_comes_in() -> None:
    for kind in ("mote", "transformer"):
        config = HeadConfig(dim=16, layers=2, experts=3, kind=kind)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(4)
        head = build_head(config, torch.eye(7, 16), generator=generator)
        back = import_official_checkpoint(official_checkpoint(head, tower(16), 0))
        x, classes = torch.randn(3, 8, 16), torch.eye(7, 16)
        with torch.no_grad():
            assert torch.equal(back.head(x, classes), head(x, classes))


@pytest.mark.parametrize(
    "config",
    [
        HeadConfig(dim=16, layers=1, placement="separate"),
        HeadConfig(dim=16, layers=1, placement="up"),
        HeadConfig(dim=16, layers=1, aggregation="outputs"),
        HeadConfig(dim=16, layers=1, modulation_neighbours=3),
        HeadConfig(dim=16, layers=1, modulation_temperature=0.1),
    ],
)
def test_a_head_the_format_cannot_say_is_not_exported(config: HeadConfig) -> None:
    with pytest.raises(UserError, match="built otherwise than the released code's"):
        official_checkpoint(build_head(config, torch.eye(7, 16)), tower(16), 0)


def test_what_cannot_be_exported() -> None:
    with pytest.raises(UserError, match="no parameters"):
        official_checkpoint(build_head(HeadConfig(dim=8, kind="mean")), tower(8), 0)
    head = build_head(HeadConfig(dim=8, layers=1), torch.eye(6, 8))
    with pytest.raises(UserError, match=r"visual\.proj is \[12, 16\], not \[12, 8\]"):
        official_checkpoint(head, tower(16), 0)
