"""TACO computes what its authors' code computes, and reads their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from featstore import UserError
from heads import import_taco_checkpoint, load_head, save_head
from heads.methods.head import build_head
from heads.methods.registry import method
from heads.methods.taco import (
    Projection,
    few_shot_positions,
    relations,
    relative_structure_loss,
    teacher_momentum,
    training_step_parts,
    update_teacher,
)
from heads.methods.taco.config import TacoConfig
from heads.methods.taco.head import TacoHead
from heads.methods.taco.official import is_of, write
from tests.support.golden.checks import check_folder
from tests.support.golden.taco import TACO_KINDS, head_of, plain_clip, stored, unpacked

DATA = Path(__file__).parents[2] / "data" / "golden_taco"
E2E = DATA / "e2e"
TOWER, HEAD = "model_state_dict", "fusion_model_state_dict"


@pytest.mark.parametrize("pattern", TACO_KINDS)
def test_every_number_of_the_authors_code_holds(pattern: str) -> None:
    found = list(check_folder(DATA, {pattern: TACO_KINDS[pattern]}))
    assert found
    wrong = [f"{file.name}: {check}" for file, check in found if not check.holds]
    assert not wrong


def test_the_teacher_remembers_the_published_part_of_a_training() -> None:
    assert teacher_momentum(1250, 15) == pytest.approx(0.9998, abs=1e-12)
    assert teacher_momentum(10, 15) == pytest.approx(0.975)
    assert teacher_momentum(1, 1) == 0.0
    for steps, epochs in ((7, 9), (400, 30), (12_345, 2)):
        memory = 1 / (1 - teacher_momentum(steps, epochs))
        assert memory / (steps * epochs) == pytest.approx(4 / 15)
    with pytest.raises(UserError, match="give at least one of each"):
        teacher_momentum(0, 15)


def test_every_golden_file_has_a_check() -> None:
    read = {path for pattern in TACO_KINDS for path in DATA.glob(pattern)}
    others = {DATA / "README.md", *DATA.glob("taco_start_*.npz")}
    assert {p for p in DATA.iterdir() if p.is_file()} <= read | others


def case(classes: int = 4, dim: int = 32) -> dict[str, Tensor]:
    """Features of a step, from one seed."""
    random = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    return {
        "video": drawn(3, dim),
        "text": drawn(classes, dim),
        "teacher_video": drawn(3, dim),
        "teacher_text": drawn(classes, dim),
        "anchors": functional.normalize(drawn(12, dim), dim=-1),
        "logit_scale": torch.tensor(2.0),
    }


def test_a_probability_of_zero_has_a_finite_gradient() -> None:
    # The first class is exactly opposite to the teacher's video, far beyond float32's exp.
    given = case(dim=8)
    given["anchors"] = torch.eye(8)
    given["teacher_text"][0] = -given["teacher_video"][0]
    given["teacher_text"][1] = given["teacher_video"][0]
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = {k: v.to(dtype).clone() for k, v in given.items()}
        leaves["logit_scale"] = torch.tensor(4.6, dtype=dtype)  # 200 between the two classes
        for name in ("video", "text", "logit_scale"):
            leaves[name].requires_grad_()
        scale = leaves["logit_scale"]
        held = relations(leaves["teacher_video"], leaves["teacher_text"], leaves["anchors"])
        probability = (scale.exp() * held).softmax(-1)
        loss = relative_structure_loss(**leaves)
        loss.backward()
        results.append((probability, loss, [leaves[n].grad for n in ("video", "text")], scale.grad))
    (low, loss, grads, of_scale), (exact, wanted, exact_grads, exact_of_scale) = results
    assert low.min() == 0 < exact.min()  # this is the underflow
    assert of_scale is not None
    assert torch.isfinite(of_scale)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(of_scale.double(), exact_of_scale, rtol=1e-4, atol=1e-4)
    for got, right in zip(grads, exact_grads, strict=True):
        assert got is not None
        assert right is not None
        torch.testing.assert_close(got.double(), right, rtol=1e-3, atol=1e-4)


def test_the_loss_is_zero_where_student_and_teacher_agree_and_only_there() -> None:
    given = case()
    same = given | {"teacher_video": 2 * given["video"], "teacher_text": 3 * given["text"]}
    assert float(relative_structure_loss(**same)) == pytest.approx(0, abs=1e-6)
    assert float(relative_structure_loss(**given)) > 1e-3


def test_no_gradient_reaches_the_teacher() -> None:
    given = {name: value.requires_grad_() for name, value in case().items()}
    relative_structure_loss(**given).backward()
    assert given["teacher_video"].grad is None
    assert given["teacher_text"].grad is None
    assert all(given[name].grad is not None for name in ("video", "text", "logit_scale"))


def test_autocast_does_not_round_the_losses() -> None:
    given, head = case(), TacoHead(TacoConfig(dim=32), 0)
    frames = given["video"][:, None].expand(-1, 4, -1)
    arguments = (
        *(head, frames, given["text"], frames + 1, given["teacher_text"], torch.tensor([0, 1, 3])),
        *(given["anchors"], given["logit_scale"]),
    )
    exact = training_step_parts(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = training_step_parts(*arguments)
    assert rounded.total.dtype == torch.float32
    torch.testing.assert_close(rounded.kl, exact.kl)


@pytest.mark.parametrize("change", [{"text": 1}, {"anchors": 5}, {"teacher_text": 3}])
def test_shapes_that_do_not_fit_are_named(change: dict[str, int]) -> None:
    given = case()
    for name, width in change.items():
        given[name] = given[name][:, :width]
    with pytest.raises(UserError, match=r"do not fit: they must be \[B,C\] twice"):
        relative_structure_loss(**given)


def test_one_class_is_too_few_and_a_label_must_be_a_class() -> None:
    given, head = case(classes=1), TacoHead(TacoConfig(dim=32), 0)
    with pytest.raises(UserError, match="needs at least 2 classes, not 1"):
        relative_structure_loss(**given)
    given = case(classes=4)
    frames = given["video"][:, None]
    with pytest.raises(UserError, match="labels from 0 to 4 do not fit a list of 4 classes"):
        training_step_parts(
            *(head, frames, given["text"], frames, given["teacher_text"]),
            *(torch.tensor([0, 1, 4]), given["anchors"], given["logit_scale"]),
        )


def test_anchors_are_of_a_draw_and_the_width() -> None:
    config = TacoConfig(dim=64)
    assert (config.anchors, TacoConfig(dim=512).anchors) == (25, 200)
    assert TacoConfig(dim=768, anchor_ratio=200 / 768).anchors == 200
    head, seed = TacoHead(config, 3), torch.Generator().manual_seed
    first = head.draw(seed(7))
    assert first.shape == (25, 64)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(25))
    assert first.equal(head.draw(seed(7)))
    assert not first.equal(head.draw(seed(8)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchor_ratio": 0.001}, "gives 0 anchors at width 64"),
        ({"teacher_momentum": 1.5}, "must be a number from 0 to 1"),
        ({"projection": 2}, "must be true or false"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TacoConfig(dim=64, **change)


def test_a_teacher_is_the_running_mean_of_its_student() -> None:
    teacher, student = {"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([3.0, 2.0])}
    for _ in range(3):
        update_teacher(teacher, student, 0.5)
    torch.testing.assert_close(teacher["a"], torch.tensor([2.75, 2.0]))


def test_more_shots_than_videos_name_the_class() -> None:
    with pytest.raises(UserError, match="3 videos per class cannot be drawn: 'wave' has 2"):
        few_shot_positions([0, 1, 0, 1, 0], 3, 0, ["run", "wave"])
    with pytest.raises(UserError, match="class 0 has 3"):
        few_shot_positions([0, 0, 0], 0, 0)


def test_a_new_head_changes_nothing_and_is_saved_and_loaded(tmp_path: Path) -> None:
    classes = functional.normalize(torch.randn(5, 16), dim=-1)
    head = build_head(TacoConfig(dim=16), classes, generator=torch.Generator().manual_seed(1))
    again = build_head(TacoConfig(dim=16), classes, generator=torch.Generator().manual_seed(1))
    assert isinstance(head, TacoHead)
    assert head.projection is not None
    assert all(a.equal(b) for a, b in zip(head.parameters(), again.parameters(), strict=True))
    frames = torch.randn(2, 3, 16)
    plain = build_head(TacoConfig(dim=16, projection=False), classes)
    assert head(frames, classes).equal(plain(frames, classes))
    with torch.no_grad():
        head.projection.linear_B.weight.normal_()
    assert not head(frames, classes).allclose(plain(frames, classes))
    save_head(head, tmp_path / "head.safetensors")
    assert load_head(tmp_path / "head.safetensors")(frames, classes).equal(head(frames, classes))


def test_only_b_moves_in_the_first_step() -> None:
    projection = Projection(8)
    projection(torch.randn(2, 3, 8)).square().sum().backward()
    assert not projection.linear_A.weight.grad.any()  # type: ignore[union-attr]
    assert projection.linear_B.weight.grad.any()  # type: ignore[union-attr]


def test_a_store_cannot_train_it() -> None:
    with pytest.raises(UserError, match="TACO cannot be trained from a store"):
        method("taco").require("trained from a store", method("taco").from_store, "x")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoints of a training, as its code wrote them."""
    work = tmp_path_factory.mktemp("taco")
    names = ("last_model", "we_model", "teacher_model")
    return {name: unpacked(E2E, name, work) for name in names}


@pytest.fixture
def content(files: dict[str, Path]) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(files["last_model"], weights_only=True)
    return loaded


def test_a_loaded_mapping_gives_what_the_file_gives(
    files: dict[str, Path], content: dict[str, Any]
) -> None:
    from_file, from_mapping = (
        import_taco_checkpoint(files["last_model"]),
        import_taco_checkpoint(content),
    )
    assert (from_file.which, from_mapping.which, from_file.epoch) == ("last", None, 3)
    assert from_file.encoder_state.keys() == content[TOWER].keys()
    for name, value in from_mapping.encoder_state.items():
        assert value.equal(from_file.encoder_state[name])
    prefixed = {"module." + k: v for k, v in content[TOWER].items()}
    assert import_taco_checkpoint(content | {TOWER: prefixed}).head.config == from_file.head.config


def test_what_was_imported_is_written_with_the_same_bits(
    files: dict[str, Path], content: dict[str, Any], tmp_path: Path
) -> None:
    imported = import_taco_checkpoint(files["last_model"])
    write(tmp_path / "out.pt", imported.head, imported.encoder_state, imported.epoch)
    again = torch.load(tmp_path / "out.pt", weights_only=True)
    assert again["epoch"] == content["epoch"]
    for part in (TOWER, HEAD):
        assert again[part].keys() == content[part].keys()
        assert all(again[part][name].equal(value) for name, value in content[part].items())


def test_a_checkpoint_without_a_projection_is_a_clip_alone(content: dict[str, Any]) -> None:
    imported = import_taco_checkpoint(content | {HEAD: {}})
    assert imported.head.projection is None
    assert imported.head.config.projection is False


def changed(content: dict[str, Any], part: str, **tensors: Tensor | None) -> dict[str, Any]:
    state = {**content[part], **{name.replace("__", "."): v for name, v in tensors.items()}}
    return content | {part: {name: v for name, v in state.items() if v is not None}}


@pytest.mark.parametrize(
    ("part", "tensors", "message"),
    [
        (TOWER, {"ln_final__weight": None}, "ln_final.weight is missing"),
        (TOWER, {"visual__proj": None}, "visual.proj is missing"),
        (TOWER, {"visual__odd": torch.ones(2)}, "visual.odd is extra"),
        (TOWER, {"text_projection": torch.ones(64, 31)}, r"text_projection is \[64, 31\], not"),
        (TOWER, {"ln_final__bias": torch.full((64,), torch.nan)}, "ln_final.bias holds NaN"),
        (HEAD, {"vision_proj__linear_A__bias": None}, "vision_proj.linear_A.bias is missing"),
        (HEAD, {"vision_proj__linear_C__bias": torch.ones(2)}, "linear_C.bias is extra"),
        (
            HEAD,
            {"vision_proj__linear_B__weight": torch.ones(32, 65)},
            r"\[32, 65\], not \[32, 64\]",
        ),
        (HEAD, {"selective__weight": torch.ones(2)}, "of Selective, a head which crashes"),
        (HEAD, {"self_distill__weight": torch.ones(2)}, "of Self-Distill, a head which crashes"),
        (HEAD, {"transformer__resblocks__0__ln_1__weight": torch.ones(2)}, "of Transf"),
        (HEAD, {"odd": torch.ones(2)}, "of a head that is not known"),
    ],
)
def test_what_does_not_fit_is_named(
    content: dict[str, Any], part: str, tensors: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        import_taco_checkpoint(changed(content, part, **tensors))


def test_files_that_are_none_of_taco_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist: name a checkpoint file, such as we_model"):
        import_taco_checkpoint(tmp_path / "no.pt")
    torch.save({"model_state": {}}, tmp_path / "other.pt")
    with pytest.raises(
        UserError, match="it lacks epoch, model_state_dict, fusion_model_state_dict"
    ):
        import_taco_checkpoint(tmp_path / "other.pt")
    (tmp_path / "cut.pt").write_bytes(files["we_model"].read_bytes()[:9000])
    with pytest.raises(UserError, match="cut off, damaged"):
        import_taco_checkpoint(tmp_path / "cut.pt")
    for epoch in (-1, True, "3"):
        with pytest.raises(UserError, match="it must be a number"):
            import_taco_checkpoint({"epoch": epoch, TOWER: plain_clip(E2E), HEAD: {}})


def test_the_four_files_of_one_training_differ(files: dict[str, Path]) -> None:
    found = {name: import_taco_checkpoint(file) for name, file in files.items()}
    assert [one.which for one in found.values()] == ["last", "mean", "teacher"]
    towers = [one.encoder_state["visual.proj"] for one in found.values()]
    assert not any(towers[0].equal(other) for other in towers[1:])
    # the teacher's file holds the student's head
    last, teacher = (found[name].head.state_dict() for name in ("last_model", "teacher_model"))
    assert last["projection.linear_A.weight"].equal(teacher["projection.linear_A.weight"])


def test_motes_files_are_none_of_tacos(content: dict[str, Any]) -> None:
    assert is_of(content)
    of_mote = {k: v for k, v in content[TOWER].items() if k.startswith("visual.")}
    block = "module.transformer.resblocks.0.ln_1.weight"
    head = {"spe_cls_feature": torch.ones(2, 2), block: torch.ones(2)}
    assert not is_of(content | {TOWER: of_mote, HEAD: head})


def test_the_projection_is_one_linear_map() -> None:
    data = stored(DATA / "taco_projection_0.npz")
    weights = {k.removeprefix("param/"): torch.from_numpy(v) for k, v in data.items()
               if k.startswith("param/")}  # fmt: skip
    head = head_of(weights, 16, torch.float64)
    assert head.projection is not None
    a, b = head.projection.linear_A, head.projection.linear_B
    means = torch.randn(5, 16, dtype=torch.float64)
    matrix = torch.eye(16, dtype=torch.float64) + b.weight @ a.weight
    wanted = means @ matrix.T + b.weight @ a.bias + b.bias
    torch.testing.assert_close(means + head.projection.added(means), wanted)
