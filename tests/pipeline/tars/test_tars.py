"""Reading tars: an index without surprises, and one clear error for every kind of damage."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from featstore.errors import WorkError
from pipeline.tars.reading import DamagedTar, open_tar


def sidecar(key: str, **changes: Any) -> bytes:
    return json.dumps(
        {"key": key, "label": 0, "num_frames": 3, "splits": ["train"], **changes}
    ).encode()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pair(key: str, data: bytes = b"video", **changes: Any) -> list[tuple[str, bytes]]:
    return [(f"{key}.mp4", data), (f"{key}.json", sidecar(key, **changes))]


def test_samples_come_in_order_with_their_bytes(tmp_path: Path) -> None:
    videos = {"b%2Fx": b"1" * 3000, "a": b"2" * 10, "c": b""}
    path = write_tar(
        tmp_path / "t.tar", [member for key, data in videos.items() for member in pair(key, data)]
    )
    with open_tar(path, path.stat().st_size) as tar:
        assert [sample.key for sample in tar.samples] == list(videos)
        assert [tar.read(sample) for sample in tar.samples] == list(videos.values())
        tar.require(hashlib.sha256(path.read_bytes()).hexdigest())
        with pytest.raises(DamagedTar, match="sha256"):
            tar.require("0" * 64)


def test_a_tar_without_samples(tmp_path: Path) -> None:
    with open_tar(write_tar(tmp_path / "t.tar", [])) as tar:
        assert tar.samples == []


@pytest.mark.parametrize(
    "name",
    [
        *("../escape.mp4", "/etc/passwd.mp4", "folder/a.mp4", ".mp4", "no_extension", "..mp4"),
        *("./a.mp4", "a/../b.mp4", "line\nbreak/x.mp4"),
    ],
)
def test_paths_in_member_names_are_refused(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / "t.tar", [*pair("a"), (name, b"x")])
    with (
        pytest.raises(DamagedTar, match=r"plain files named KEY\.EXTENSION") as info,
        open_tar(path),
    ):
        pass
    assert "\n" not in str(info.value)
    assert str(path) in str(info.value)


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
)
def test_links_devices_and_folders_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.mp4")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DamagedTar, match="plain files"), open_tar(path):
        pass


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.mp4", b"x")], "lacks the video or the JSON of 'a'"),
        ([("a.json", sidecar("a"))], "lacks the video or the JSON of 'a'"),
        ([*pair("a"), ("a.avi", b"y")], "holds 'a' twice"),
        ([*pair("a"), ("a.json", b"{}")], "holds 'a' twice"),
        ([("a.mp4", b"x"), ("a.json", b"{")], "a.json is not JSON"),
        ([("a.mp4", b"x"), ("a.json", b"\xff\xfe")], "a.json is not JSON"),
        ([("a.mp4", b"x"), ("a.json", b"[" * 100_000)], "a.json is not JSON"),
        ([("a.mp4", b"x"), ("a.json", b"[]")], "a.json is not a JSON object"),
        ([("a.mp4", b"x"), ("a.json", b" " * (1 << 21))], "sidecar of 2097152 bytes"),
        ([("a.mp4", b"x"), ("a.json", b"{}")], "key in a.json is None"),
        ([("a.mp4", b"x"), ("a.json", sidecar("b"))], "sidecar of another video"),
        (pair("a", label="0"), "label in a.json is '0'"),
        (pair("a", label=True), "label in a.json is True"),
        (pair("a", splits="train"), "splits in a.json is 'train'"),
        (pair("a", splits=[1]), "sidecar of another video"),
        (pair("a", num_frames=None), "num_frames in a.json is None"),
    ],
)
def test_members_that_are_no_samples(
    tmp_path: Path, members: list[tuple[str, bytes]], words: str
) -> None:
    path = write_tar(tmp_path / "t.tar", members)
    with pytest.raises(DamagedTar) as info, open_tar(path):
        pass
    assert words in str(info.value)
    assert "mote-cli pack" in str(info.value)


def test_damaged_files(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", [*pair("a", b"v" * 5000), *pair("b", b"w" * 5000)])
    data, size = path.read_bytes(), path.stat().st_size
    header = 512  # of the first member; the second member's follows its content
    for name, content, words in (
        ("cut", data[:3000], f"has 3000 bytes, but {size} were packed"),
        ("empty", b"", "has 0 bytes"),
        ("header", b"\0" * 100 + b"x" + data[101:], "damaged"),
        ("not a tar", b"x" * size, "damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(DamagedTar) as info, open_tar(path, size):
            pass
        assert words in str(info.value), name
    for cut in (header + 100, 3000):  # nobody said how long it must be
        path.write_bytes(data[:cut])
        with pytest.raises(DamagedTar), open_tar(path):
            pass
    path.unlink()
    with pytest.raises(DamagedTar, match="is missing"), open_tar(path):
        pass
    path.mkdir()
    with pytest.raises(DamagedTar, match="cannot be read"), open_tar(path):
        pass


def test_a_tar_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", pair("a", b"v" * 50_000))
    with open_tar(path) as tar:
        path.write_bytes(path.read_bytes()[:10_000])
        with pytest.raises(DamagedTar, match="ends inside 'a'"):
            tar.read(tar.samples[0])


def test_errors_of_the_work_with_a_tar_are_not_its_damage(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", pair("a"))
    with pytest.raises(FileNotFoundError), open_tar(path):
        raise FileNotFoundError("something else")
    assert issubclass(DamagedTar, WorkError)
