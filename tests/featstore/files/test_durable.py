"""Several folders appear together or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from featstore.files.durable import new_folders


def test_they_appear_when_all_are_filled(tmp_path: Path) -> None:
    staging, targets = tmp_path / ".staging", (tmp_path / "a" / "one", tmp_path / "b" / "two")
    (staging / "0").mkdir(parents=True)
    (staging / "0" / "left by a killed process").touch()
    with new_folders(staging, *targets) as folders:
        for number, folder in enumerate(folders):
            (folder / "file").write_text(str(number))
        assert not any(target.exists() for target in targets)
    assert [(target / "file").read_text() for target in targets] == ["0", "1"]
    assert [len(list(target.iterdir())) for target in targets] == [1, 1]
    assert not staging.exists()


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_none(tmp_path: Path, error: type[BaseException]) -> None:
    targets = (tmp_path / "one", tmp_path / "two")

    def fill() -> None:
        with new_folders(tmp_path / ".staging", *targets) as folders:
            (folders[0] / "file").touch()
            raise error

    with pytest.raises(error):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "two"

    def fill() -> None:
        with new_folders(tmp_path / ".staging", first, second):
            second.mkdir()
            (second / "theirs").touch()

    with pytest.raises(FileExistsError, match="two exists already"):
        fill()
    assert [p.name for p in tmp_path.iterdir()] == ["two"]
    assert (second / "theirs").exists()
