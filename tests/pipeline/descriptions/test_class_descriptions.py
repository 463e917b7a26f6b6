"""Class descriptions: what a file must hold, templates, and published files by class name."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore.errors import UserError
from pipeline.clip_encoder import Encoder, load_encoder
from pipeline.descriptions.check import check_descriptions, read_class_descriptions
from pipeline.descriptions.published import import_descriptions
from pipeline.descriptions.wording import (
    MOST_TEMPLATES,
    REQUEST,
    SPATIAL_TEMPLATES,
    TEMPORAL_TEMPLATES,
    request_text,
    template_descriptions,
)
from tests.support.worlds.tiny_world import make_encoder, make_viclip

CLASSES = ("brush hair", "climb stairs", "wave")
REPOSITORY = Path(__file__).parents[3]


def described(**changes: Any) -> dict[str, Any]:
    """The value of a right file, with some classes changed, or left out where None."""
    value: dict[str, Any] = {
        name: {
            "spatial": [f"a still of {name}", f"people at {name}"],
            "temporal": [f"{name} begins", f"{name} ends"],
        }
        for name in CLASSES
    }
    value |= {name.replace("_", " "): held for name, held in changes.items()}
    return {name: held for name, held in value.items() if held is not None}


def written(folder: Path, value: Any) -> Path:
    file = folder / "mine.json"
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    return file


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoder, Encoder]:
    """A CLIP with room for 75 tokens and a ViCLIP with room for 30."""
    folder = tmp_path_factory.mktemp("towers")
    clip = load_encoder(str(make_encoder(folder / "tiny")), "fp32")
    return clip, load_encoder(f"viclip:{make_viclip(folder / 'v.safetensors')}", "fp32")


def test_a_right_file_is_read_in_the_order_of_the_classes(tmp_path: Path) -> None:
    file = written(tmp_path, dict(reversed(described().items())))
    found = read_class_descriptions(file, CLASSES)
    assert found.class_names == CLASSES
    assert found.per_class == 2
    assert found.spatial[2] == ("a still of wave", "people at wave")
    assert found.temporal[0] == ("brush hair begins", "brush hair ends")
    assert found.to_json() == described()
    half = found.of(["Wave", "brush_hair"])
    assert half.spatial == (found.spatial[2], found.spatial[0])
    with pytest.raises(UserError, match="no sentences for class 'jump'"):
        found.of(["jump"])


def test_the_hash_depends_on_every_sentence_name_kind_and_order(tmp_path: Path) -> None:
    base = described()
    other = json.loads(json.dumps(base))
    other["wave"]["temporal"][1] = "wave stops"
    swapped = json.loads(json.dumps(base))
    held = swapped["wave"]
    held["spatial"], held["temporal"] = held["temporal"], held["spatial"]
    hashes = {
        read_class_descriptions(written(tmp_path, value), names).hash
        for value, names in (
            (base, CLASSES),
            (other, CLASSES),
            (swapped, CLASSES),
            (base, CLASSES[::-1]),
        )
    }
    assert len(hashes) == 4


@pytest.mark.parametrize("name", ["Brush_Hair", "BRUSH HAIR", "brush-hair", "BrushHair"])
def test_names_are_compared_as_a_person_reads_them(tmp_path: Path, name: str) -> None:
    value = described()
    value[name] = value.pop("brush hair")
    assert read_class_descriptions(written(tmp_path, value), CLASSES).to_json() == described()


def test_an_accent_is_one_letter_or_two_signs(tmp_path: Path) -> None:
    value = {"cafe\u0301": described()["wave"], "wave": described()["wave"]}
    assert read_class_descriptions(written(tmp_path, value), ["caf\u00e9", "wave"]).per_class == 2


TWO = ["one thing", "another thing"]


@pytest.mark.parametrize(
    ("changes", "named", "reason"),
    [
        ({"wave": None}, "wave", "it has no sentences"),
        ({"jump": {"spatial": TWO, "temporal": TWO}}, "jump", "it is no class of these"),
        (
            {"Wave": {"spatial": TWO, "temporal": TWO}},
            "Wave",
            "'wave' reads the same: keep one of the two",
        ),
        ({"wave": TWO}, "wave", "its value is of type list"),
        ({"wave": {"spatial": TWO}}, "wave", "it has no list 'temporal'"),
        ({"wave": {"spatial": TWO, "temporal": "two"}}, "wave", "it has no list 'temporal'"),
        (
            {"wave": {"spatial": TWO, "temporal": TWO, "spacial": TWO}},
            "wave",
            "did you mean spatial?",
        ),
        ({"wave": {"spatial": [], "temporal": TWO}}, "wave", "spatial has 0 sentences"),
        ({"wave": {"spatial": TWO, "temporal": ["one"]}}, "wave", "temporal has 1 sentence, most"),
        ({"wave": {"spatial": TWO, "temporal": ["one", "  "]}}, "wave", "temporal sentence 2 is"),
        ({"wave": {"spatial": [1, "one"], "temporal": TWO}}, "wave", "spatial sentence 1 is 1:"),
        (
            {"wave": {"spatial": ["a" * 1001, "one"], "temporal": TWO}},
            "wave",
            "has 1001 characters",
        ),
    ],
)
def test_what_is_wrong_is_listed_by_class(
    tmp_path: Path, changes: dict[str, Any], named: str, reason: str
) -> None:
    file = written(tmp_path, described(**changes))
    checked = check_descriptions(file, CLASSES)
    assert [finding.class_name for finding in checked.wrong] == [named]
    assert reason in checked.wrong[0].reason
    assert checked.descriptions is None
    with pytest.raises(UserError, match=f"class '{named}'") as error:
        read_class_descriptions(file, CLASSES)
    assert "mote-cli descriptions check" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_misspelt_name_is_led_to_the_right_one(tmp_path: Path) -> None:
    value = described()
    value["climb stars"] = value.pop("climb stairs")
    wrong = check_descriptions(written(tmp_path, value), CLASSES).wrong
    assert {finding.class_name for finding in wrong} == {"climb stairs", "climb stars"}
    assert "did you mean 'climb stairs'?" in str(wrong[1])


@given(seed=st.integers(0, 10**6), broken=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_every_broken_class_is_named_and_no_other(
    tmp_path_factory: pytest.TempPathFactory, seed: int, broken: int
) -> None:
    draw = random.Random(seed)
    names = [f"class {number}" for number in range(12)]
    chosen = set(draw.sample(names, broken))
    value: dict[str, Any] = {}
    for name in names:
        held = {"spatial": [f"{name} a", f"{name} b"], "temporal": [f"{name} c", f"{name} d"]}
        if name in chosen:
            held[draw.choice(["spatial", "temporal"])] = draw.choice([[], ["one"], ["a", ""]])
        value[name] = held
    file = written(tmp_path_factory.mktemp("drawn"), value)
    checked = check_descriptions(file, names)
    assert {finding.class_name for finding in checked.wrong} == chosen


def test_a_sentence_twice_in_a_class_is_doubtful(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    value = described(wave={"spatial": ["A hand.", "a hand."], "temporal": TWO})
    file = written(tmp_path, value)
    checked = check_descriptions(file, CLASSES)
    assert not checked.wrong
    (finding,) = checked.doubtful
    assert "spatial sentence 2 is spatial sentence 1 again" in str(finding)
    read_class_descriptions(file, CLASSES)
    assert "sentence 1 again" in caplog.text


def test_sentences_that_a_tower_has_no_room_for(
    tmp_path: Path, towers: tuple[Encoder, Encoder]
) -> None:
    long, longer = " ".join(["word"] * 31), " ".join(["word"] * 76)
    value = described(wave={"spatial": [long, "one"], "temporal": ["two", longer]})
    file = written(tmp_path, value)
    for tower, room, counts in zip(towers, (75, 30), ([76], [31, 76]), strict=True):
        checked = check_descriptions(file, CLASSES, tower)
        assert checked.room == room
        assert checked.longest is not None
        assert (checked.longest.class_name, checked.longest.tokens) == ("wave", 76)
        found = [finding.reason for finding in checked.wrong]
        assert len(found) == len(counts)
        for reason, count in zip(found, counts, strict=True):
            assert f"has {count} tokens" in reason
            assert f"takes {room}" in reason
        with pytest.raises(UserError, match=f"takes {room}"):
            tower.tokenize([longer])
    assert not check_descriptions(file, CLASSES).wrong  # nobody asked about a tower


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not JSON"),
        ("[1, 2]", "holds no object"),
        ("{}", "holds no object"),
        ("null", "holds no object"),
        ('{"a": 1, "a": 2}', "twice in one object"),
        ("[" * 100_000, "nested more than"),
        ('{"a":' * 50 + "1" + "}" * 50, "nested more than"),
        ('{"a": NaN}', "no finite number"),
        ('{"a": "\\ud800"}', "half a character"),
        ('{"0": ["a"], "1": ["b"]}', "its keys are numbers"),
    ],
)
def test_a_hostile_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        check_descriptions(written(tmp_path, text), CLASSES)
    assert "\n" not in str(error.value)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "huge.json"
    with open(file, "wb") as made:
        made.truncate(2**40)  # takes no room on the disk
    with pytest.raises(UserError, match="too many for its kind"):
        check_descriptions(file, CLASSES)


# Templates and the request


@pytest.mark.parametrize("per_class", [1, 2, MOST_TEMPLATES])
def test_templates_are_a_right_file_for_every_tower(
    tmp_path: Path, towers: tuple[Encoder, Encoder], per_class: int
) -> None:
    made = template_descriptions(CLASSES, per_class)
    made.write(tmp_path / "t.json")
    for tower in towers:
        checked = check_descriptions(tmp_path / "t.json", CLASSES, tower)
        assert (checked.wrong, checked.doubtful) == ((), ())
        assert checked.descriptions is not None
        assert checked.descriptions.hash == made.hash
        assert checked.sentences == 2 * per_class * len(CLASSES)
    assert all("wave" in line for line in made.spatial[2] + made.temporal[2])
    with pytest.raises(UserError, match="exists already"):
        made.write(tmp_path / "t.json")
    with pytest.raises(UserError, match=f"take 1 to {MOST_TEMPLATES}"):
        template_descriptions(CLASSES, MOST_TEMPLATES + 1)


def test_the_request_holds_the_classes_and_the_page_holds_the_request() -> None:
    text = request_text(['say "hi" {count}', "é"], 3)
    assert json.loads(text[text.rindex("\n[") :]) == ['say "hi" {count}', "é"]
    assert 'exactly 3 "temporal" sentences' in text
    page = (REPOSITORY / "docs" / "descriptions.md").read_text()
    assert REQUEST.rstrip() in page
    assert all(f"| {line} |" in page for line in (*SPATIAL_TEMPLATES, *TEMPORAL_TEMPLATES))


# Published files

# In the folders' order; X-CLIP's label file has each pair the other way round.
FOLDERS = ["jump", "kick", "kick ball", "sword", "sword exercise", "wave"]
PUBLISHED = ["jump", "kick ball", "kick", "sword exercise", "sword", "wave"]


def pair(folder: Path, names: list[str], *, say: bool = True) -> tuple[Path, Path]:
    """Two files keyed by number whose sentences are about `names`, and name them if they `say`."""
    files = folder / "2_s_description_hmdb.json", folder / "2_t_description_hmdb.json"
    for file, kind in zip(files, ("seen in", "a step of"), strict=True):
        lines = {
            str(number): [
                f"A video of {name if say else f'number {number}'}, {kind} it, part {part}."
                for part in (1, 2)
            ]
            for number, name in enumerate(names)
        }
        file.write_text(json.dumps(lines))
    return files


def name_file(folder: Path, names: list[str]) -> Path:
    file = folder / "labels.csv"
    file.write_text("id,name\n" + "".join(f"{i},{name}\n" for i, name in enumerate(names)))
    return file


@pytest.mark.parametrize("listed", [FOLDERS, PUBLISHED, [n.replace(" ", "_") for n in FOLDERS]])
def test_published_sentences_go_to_the_class_that_they_name(
    tmp_path: Path, listed: list[str]
) -> None:
    files = pair(tmp_path, PUBLISHED)
    out = tmp_path / "out.json"
    checked, exchanges = import_descriptions(*files, name_file(tmp_path, listed), out)
    assert not checked.wrong
    made = read_class_descriptions(out, FOLDERS)
    for name, seen, steps in zip(FOLDERS, made.spatial, made.temporal, strict=True):
        assert all(f"of {name}," in line for line in seen + steps)
    assert [exchange.exchanged for exchange in exchanges] == [listed != PUBLISHED] * 2
    assert all("name the class" in exchange.reason for exchange in exchanges)


def test_right_files_in_the_folders_order_are_left(tmp_path: Path) -> None:
    files, out = pair(tmp_path, FOLDERS), tmp_path / "out.json"
    _, exchanges = import_descriptions(*files, name_file(tmp_path, FOLDERS), out)
    assert [exchange.exchanged for exchange in exchanges] == [False, False]
    made = read_class_descriptions(out, FOLDERS)
    assert all(f"of {name}," in made.spatial[i][0] for i, name in enumerate(FOLDERS))


@pytest.mark.parametrize(("listed", "exchanged"), [(FOLDERS, True), (PUBLISHED, False)])
def test_sentences_without_names_follow_the_published_order(
    tmp_path: Path, listed: list[str], exchanged: bool
) -> None:
    files, out = pair(tmp_path, PUBLISHED, say=False), tmp_path / "out.json"
    _, exchanges = import_descriptions(*files, name_file(tmp_path, listed), out)
    assert [exchange.exchanged for exchange in exchanges] == [exchanged] * 2
    made = read_class_descriptions(out, FOLDERS)
    assert "number 1," in made.spatial[FOLDERS.index("kick ball")][0]


def test_other_lists_are_mapped_as_they_are(tmp_path: Path) -> None:
    names = ["wave", "jump", "brush hair"]
    files, out = pair(tmp_path, names, say=False), tmp_path / "out.json"
    _, exchanges = import_descriptions(*files, name_file(tmp_path, names), out)
    assert exchanges == ()
    made = read_class_descriptions(out, sorted(names))
    assert ["number 2" in lines[0] for lines in made.spatial] == [True, False, False]


def test_both_halves_become_one_file(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    for number, half in enumerate((FOLDERS[:3], FOLDERS[3:])):
        folder = tmp_path / str(number)
        folder.mkdir()
        files = pair(folder, half)
        labels = name_file(folder, half)
        checked, _ = import_descriptions(*files, labels, out, append=number > 0)
        if number:
            with pytest.raises(UserError, match="has 3 of the listed classes already"):
                import_descriptions(*files, labels, out, append=True)
        with pytest.raises(UserError, match="exists already"):
            import_descriptions(*files, labels, out)
    assert not checked.wrong
    assert list(json.loads(out.read_text())) == FOLDERS


def test_an_import_that_cannot_be_right_writes_nothing(tmp_path: Path) -> None:
    spatial, temporal = pair(tmp_path, FOLDERS)
    labels, out = name_file(tmp_path, FOLDERS), tmp_path / "out.json"
    with pytest.raises(UserError, match="name the spatial file first"):
        import_descriptions(temporal, spatial, labels, out)
    with pytest.raises(UserError, match="it lacks 6"):
        import_descriptions(spatial, temporal, name_file(tmp_path, [*FOLDERS, "run"]), out)
    with pytest.raises(UserError, match="the list lacks, 5"):
        import_descriptions(spatial, temporal, name_file(tmp_path, FOLDERS[:5]), out)
    labels = name_file(tmp_path, FOLDERS)
    spatial.write_text('{"jump": ["a"]}')
    with pytest.raises(UserError, match="key 'jump' is no number"):
        import_descriptions(spatial, temporal, labels, out)
    spatial.write_text('{"1": ["a"], "01": ["b"]}')
    with pytest.raises(UserError, match="has number 1 twice"):
        import_descriptions(spatial, temporal, labels, out)
    assert not out.exists()
