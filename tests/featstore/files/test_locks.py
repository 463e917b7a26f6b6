"""Lock files: one holder at a time, and none left of what was never made."""

from __future__ import annotations

import logging
from pathlib import Path
from threading import Event, Thread

import pytest

from featstore import WorkError
from featstore.files.locks import exclusive, holder


class Noticed(logging.Handler):
    """Sets an event with the first notice."""

    def __init__(self) -> None:
        super().__init__()
        self.event = Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.event.set()


def test_work_that_makes_nothing_leaves_no_lock_and_no_folder(tmp_path: Path) -> None:
    made = tmp_path / "runs/first/config.json"
    lock = made.parent / "state/lock"
    with (
        pytest.raises(ZeroDivisionError),
        exclusive(lock, "training", keep=made.is_file),
    ):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs").mkdir()
    with exclusive(lock, "training", keep=made.is_file):
        pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"]  # which was there before
    with exclusive(lock, "training", keep=made.is_file):
        made.touch()
    assert lock.is_file()


def test_who_waited_for_a_lock_that_is_removed_holds_the_one_of_this_name(tmp_path: Path) -> None:
    """Else it and the next process would hold two different files, and both would work."""
    lock, waits = tmp_path / "x.lock", Noticed()
    holds, done = Event(), Event()

    def second() -> None:
        with exclusive(lock, "making x", wait=True):
            holds.set()
            assert done.wait(60)

    thread = Thread(target=second)
    log = logging.getLogger("featstore.files.locks")
    log.setLevel(logging.INFO)
    log.addHandler(waits)
    try:
        with exclusive(lock, "making x", keep=lambda: False):
            thread.start()
            assert waits.event.wait(60)
        assert holds.wait(60)
        assert holder(lock) is not None
        with (
            pytest.raises(WorkError, match="is making x: wait for it"),
            exclusive(lock, "making x"),
        ):
            pass
    finally:
        done.set()
        log.removeHandler(waits)
        log.setLevel(logging.NOTSET)
        thread.join()
    with exclusive(lock, "making x"):
        pass
