"""Several folders appear together or not at all; a file has the mode that the umask gives."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from featstore.files.durable import durable_file, durable_path, new_folders


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


def test_a_file_has_the_mode_of_the_umask_whoever_makes_it(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with durable_path(tmp_path / "mine") as place:
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o600))
        with durable_file(tmp_path / "usual") as file:
            file.write(b"x")
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("mine", "usual")] == [0o640] * 2
