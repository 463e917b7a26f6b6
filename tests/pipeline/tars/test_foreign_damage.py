"""Foreign tars that are damaged or made to do harm, and patterns that cannot be meant."""

from __future__ import annotations

import io
import struct
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from featstore.errors import UserError, WorkError
from pipeline.tars.foreign.classes import ClassChoice
from pipeline.tars.foreign.samples import UnreadableTar, find_samples
from pipeline.tars.foreign.sources import named_tars
from pipeline.tars.foreign.taking import pack_tars
from tests.support.worlds.foreign_tars import (
    as_json,
    clip,
    entries,
    failures,
    labelled_tars,
    raw_tar,
    take,
)


def found(path: Path, field: str = "") -> Any:
    with open(path, "rb") as file:
        return find_samples(file, field)


def test_a_truncated_tar_gives_its_whole_samples(tmp_path: Path) -> None:
    path = labelled_tars(tmp_path, tars=1)[0]
    whole = found(path).samples
    path.write_bytes(path.read_bytes()[: whole[3].offset + 100])
    summary, dataset = take(tmp_path / "out", path)
    assert sorted(entries(dataset)) == ["00000", "00001", "00002"]
    told = failures(tmp_path / "out")
    assert "its video is cut off" in told["00003"]
    assert "breaks off after '00003.mp4'" in told[str(path)]
    assert any("breaks off" in note for note in summary.notes)


def test_a_header_that_is_damaged_ends_the_tar_and_says_so(tmp_path: Path) -> None:
    path = labelled_tars(tmp_path, tars=1)[0]
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        member = tar.getmembers()[4]
    data[member.offset + 3] ^= 0xFF  # tarfile itself takes this for the end
    path.write_bytes(data)
    assert len(found(path).samples) == 2
    assert "no header at byte" in found(path).problem


def test_a_hole_of_zeros_is_not_the_end(tmp_path: Path) -> None:
    path = labelled_tars(tmp_path, tars=1)[0]
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        member = tar.getmembers()[4]
    data[member.offset : member.offset + 1024] = bytes(1024)
    path.write_bytes(data)
    assert len(found(path).samples) == 2
    assert "more data follows" in found(path).problem
    data[:1024] = bytes(1024)
    path.write_bytes(data)
    with pytest.raises(UnreadableTar, match="more data follows"):
        found(path)


def test_files_that_are_no_tars_are_named_together(tmp_path: Path) -> None:
    labelled_tars(tmp_path, tars=1)
    (tmp_path / "x.tar").write_bytes(b"no tar " * 1000)
    (tmp_path / "y.tar").write_bytes(b"\x1f\x8b" + b"z" * 2000)
    (tmp_path / "z.tar").write_bytes(b"")
    with pytest.raises(WorkError, match=r"3 of 4 tars cannot be used: .*x\.tar is no tar"):
        take(tmp_path / "out", tmp_path / "*.tar")
    with pytest.raises(UnreadableTar, match="gunzip"):
        found(tmp_path / "y.tar")
    summary, _ = take(tmp_path / "out", tmp_path / "clips*.tar")
    assert summary.videos_packed == 6


@pytest.mark.parametrize("name", ["../../up", "/etc/passwd", "a/../../b"])
def test_names_that_lead_out_of_the_tar(tmp_path: Path, name: str) -> None:
    path = raw_tar(
        tmp_path / "a.tar",
        [("ok.mp4", clip(0)), ("ok.cls", b"x"), (f"{name}.mp4", clip(1)), (f"{name}.cls", b"x")],
    )
    before = {p for p in tmp_path.parent.rglob("*") if p.is_file()}
    _, dataset = take(tmp_path / "out", path)
    assert list(entries(dataset)) == ["ok"]
    (reason,) = failures(tmp_path / "out").values()
    assert "leads out of the tar" in reason
    new = {p for p in tmp_path.parent.rglob("*") if p.is_file()} - before
    assert all(p.is_relative_to(tmp_path / "out") for p in new)


def test_members_that_are_no_files(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("link", tarfile.SYMTYPE), ("pipe", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(f"{name}.mp4")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        tar.addfile(tarfile.TarInfo("README"))
    samples = found(path)
    assert {s.key: s.reason for s in samples.samples} == {
        "link": "its video is a link or a device, no file",
        "pipe": "its video is a link or a device, no file",
    }
    assert samples.passed_over == ["README"]


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A header with any bytes as its size, and the right checksum."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[108:116], block[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    block[124:136], block[136:148], block[156:157] = size, b"00000000000\0", kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


def test_sizes_in_headers_are_not_trusted(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    minus = b"\xff" * 4 + struct.pack(">q", -512)
    huge = b"\x80" + b"\0" * 3 + struct.pack(">q", 1 << 50)
    good = header(b"a.mp4", b"00000000004\0") + b"data".ljust(512, b"\0")
    for bad in (
        header(b"b.mp4", minus),
        header(b"b.mp4", minus, b"x") + b"\0" * 512,
        header(b"b.mp4", huge, b"x"),
        header(b"b.mp4", huge, b"L"),
        header(b"b.mp4", huge),
        header(b"b.mp4", minus, b"L") * 3,
    ):
        path.write_bytes(good + bad + b"\0" * 1024)
        samples = found(path)
        assert samples.samples[0].size == 4
        assert samples.problem
        path.write_bytes(bad + b"\0" * 1024)
        with suppress(UnreadableTar):
            assert not [s for s in found(path).samples if not s.reason]
    # A chain of headers that never comes to a member.
    path.write_bytes(good + header(b"b", b"00000000004\0", b"L") * 1 + b"x".ljust(512, b"\0") * 3)
    assert found(path).problem


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"\xff\xfe\x00", "not JSON"),
        (b'{"label": null}', "'label' is empty"),
        (b'{"label": ["x"]}', "neither a name nor a number"),
        (b'{"label": true}', "neither a name nor a number"),
        (b'{"label": "\\u001b[31mred"}', "control characters"),
        (b'{"label": "' + b"x" * 2000 + b'"}', "2000 characters"),
        (b" " * (17 << 20), "more than"),
    ],
)
def test_json_that_names_no_class(tmp_path: Path, content: bytes, words: str) -> None:
    path = raw_tar(tmp_path / "a.tar", [("a.mp4", b"x"), ("a.json", content)])
    (sample,) = found(path, "label").samples
    assert sample.label == ""
    assert words.replace("'label' is empty", "no 'label'") in sample.unread


def test_surrogates_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, data in (
            ("\xe9.mp4", clip(0)),
            ("\xe9.cls", b"x"),
            ("b.mp4", clip(1)),
            ("b.cls", b"\xff\xfe"),
            ("c.mp4", clip(2)),
            ("c.json", as_json(label="x", caption="\ud800")),
            ("c.cls", b"x"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    _, dataset = take(tmp_path / "out", path)
    assert list(entries(dataset)) == ["c"]
    told = failures(tmp_path / "out")
    assert "not valid UTF-8" in told["%E9"]
    assert "not UTF-8 text" in told["b"]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("nowhere-{000..002}.tar", "3 of 3 tars do not exist"),
        ("nowhere*.tar", "no file matches"),
        ("x{0..999999999}.tar", "a range of more than"),
        ("x{0..99999}{0..99999}.tar", "more than 100000 tars"),
        ("x{0..3.tar", "close every brace"),
        (".", "is a folder"),
        ("pipe:curl http://x", "takes no pipe"),
        ("ftp://host/a.tar", "a URL with ftp does not name a file"),
        ("file:///etc/passwd", "a URL with file does not name a file"),
        ("https://user:secret@host/a.tar", "holds a password"),
        ("https://host/a.tar?token=secret", "holds a password, '?' or '#'"),
        ("https://host/*.tar", "no patterns over https"),
        ("https://host/", "names no file"),
        ("https://host/../a.tar", "is no path"),
        ("s3://bucket", "names no file"),
        ("s3://bu*cket/a.tar", "pattern in the bucket's name"),
        ("train=nowhere.tar", "1 of 1 tar does not exist"),
    ],
)
def test_patterns_that_cannot_be_meant(
    pattern: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        named_tars([pattern])
    assert words in str(error.value)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_patterns_in_natural_order(tmp_path: Path) -> None:
    for name in ("a-2.tar", "a-10.tar", "b=1.tar", "c{1}.tar"):
        (tmp_path / name).touch()
    assert [Path(t.source).name for t in named_tars([f"{tmp_path}/a-*.tar"])] == [
        *("a-2.tar", "a-10.tar")
    ]
    assert [t.split for t in named_tars([f"test={tmp_path}/a-{{2,10}}.tar"])] == ["test"] * 2
    assert named_tars([f"{tmp_path}/c{{1}}.tar"])[0].source == f"{tmp_path}/c{{1}}.tar"
    assert named_tars([f"{tmp_path}/a-2.tar"] * 2)[1:] == []


def test_tars_without_any_sample(tmp_path: Path) -> None:
    raw_tar(tmp_path / "a.tar", [])
    with pytest.raises(UserError, match="hold no samples"):
        pack_tars([str(tmp_path / "a.tar")], "own", tmp_path / "out", classes=ClassChoice())
    raw_tar(tmp_path / "b.tar", [("a.txt", b"x")])
    with pytest.raises(UserError, match="none of the 1 samples can be used"):
        take(tmp_path / "out", tmp_path / "b.tar")
