"""Objects on a real S3-compatible server, also when the way to it fails; errors hold no secret."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from threading import Event, Timer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featstore.errors import UserError, WorkError
from featstore.remote.objects import ChangedObject, MissingObject, ObjectFolder
from featstore.remote.urls import is_url, parsed
from tests.support.servers.s3_server import ACCESS_KEY, SECRET_KEY, FailingProxy, S3Server

CONTENT = bytes(range(256)) * 4000  # 1 MB


def impatient(url: str, seconds: float) -> ObjectFolder:
    """The folder, with another time for which failing requests are repeated."""
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("MOTE_RETRY_SECONDS", str(seconds))
        return ObjectFolder(url)


@pytest.mark.parametrize("prefix", ["", "/some where/é"])
def test_what_is_put_comes_back(bucket: str, tmp_path: Path, prefix: str) -> None:
    folder = ObjectFolder(bucket + prefix + "/")
    assert folder.list() == {}
    names = ["a", "b/c.tar", "b/日本 +=@,'()!&$;:.bin"]
    for i, name in enumerate(names):
        assert folder.put(name, CONTENT[i:])
    assert {n: o.size for n, o in folder.list().items()} == {
        name: len(CONTENT) - i for i, name in enumerate(names)
    }
    for i, name in enumerate(names):
        assert folder.get_bytes(name, 10**7) == CONTENT[i:]
        folder.download(name, tmp_path / "deep" / "file", len(CONTENT) - i)
        assert (tmp_path / "deep" / "file").read_bytes() == CONTENT[i:]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["file"]
    folder.delete("a")
    folder.delete("a")
    assert sorted(folder.list()) == sorted(names[1:])


def test_a_large_file_goes_up_in_parts_and_comes_back(
    bucket: str, proxy: FailingProxy, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    large.write_bytes(os.urandom(17 * 2**20))
    folder = ObjectFolder(bucket)
    proxy.fail = ["ok", "503", "drop"]
    folder.put("large", large)
    assert sum("partNumber" in path for _, path, _ in proxy.requests) >= 2
    folder.download("large", tmp_path / "again", large.stat().st_size)
    assert (tmp_path / "again").read_bytes() == large.read_bytes()


def test_only_new(bucket: str) -> None:
    folder = ObjectFolder(bucket)
    assert folder.put("x", b"first", only_new=True)
    assert not folder.put("x", b"second", only_new=True)
    assert folder.get_bytes("x", 10) == b"first"


@pytest.mark.parametrize(
    "name",
    ["", "/a", "a/", "a//b", ".", "..", "a/../b", "../a", "a\\b", "a\nb", "a?b", " ", "a%2e"],
)
def test_names_that_are_no_names(bucket: str, name: str) -> None:
    folder = ObjectFolder(bucket)
    for use in (folder.delete, lambda n: folder.put(n, b"")):
        with pytest.raises(UserError, match="is no object name"):
            use(name)


@settings(deadline=None)
@given(st.text(min_size=4))
def test_a_url_with_credentials_is_refused_and_not_repeated(secret: str) -> None:
    for url in (f"s3://AKIA:{secret}@bucket/x", f"s3://AKIA/{secret}@bucket"):
        with pytest.raises(UserError) as error:
            parsed(url)
        with pytest.raises(UserError) as other:
            parsed("s3://AKIA:another secret@bucket/x")
        assert str(error.value) == str(other.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "bucket/x",
        "http://host/bucket",
        "s3://",
        "s3:///x",
        "s3://b",
        "s3://bucket/../x",
        "s3://bucket//x",
        "s3://bucket/x?versionId=1",
        "s3://bucket:80/x",
        "s3://bu\tcket/x",
    ],
)
def test_urls_that_are_none(bucket: str, url: str) -> None:
    with pytest.raises(UserError):
        ObjectFolder(url)


def test_what_is_a_url() -> None:
    assert is_url("s3://bucket/x")
    assert is_url("http://x")
    assert not is_url("data/x")
    assert not is_url(Path("s3://bucket/x"))


@pytest.mark.parametrize(
    "fate",
    [["503", "503"], ["drop", "drop"], [700_000], [300_000, "503", 200_000, "drop", 0]],
    ids=str,
)
def test_a_download_survives(
    bucket: str, proxy: FailingProxy, tmp_path: Path, fate: list[str | int]
) -> None:
    folder = ObjectFolder(bucket)
    folder.put("x", CONTENT)
    proxy.requests.clear()
    proxy.fail = list(fate)
    folder.download("x", tmp_path / "x", len(CONTENT))
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert len(proxy.requests) == 1 + len(fate)
    if isinstance(fate[0], int):  # resumed, not begun anew
        assert proxy.requests[-1][2].startswith("bytes=")


def test_a_body_that_always_ends_early(bucket: str, proxy: FailingProxy, tmp_path: Path) -> None:
    ObjectFolder(bucket).put("x", CONTENT)
    proxy.only, proxy.fail = "GET", [0] * 1000
    with pytest.raises(WorkError, match=rf"breaks off after 0 of {len(CONTENT)} bytes"):
        impatient(bucket, 0.5).download("x", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("expected", [True, False], ids=["a version expected", "any version"])
def test_an_object_that_changes_on_the_way_is_not_mixed(
    bucket: str,
    proxy: FailingProxy,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: bool,
) -> None:
    folder = ObjectFolder(bucket)
    folder.put("x", CONTENT)
    listed = folder.list()["x"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.environment["AWS_ENDPOINT_URL"])
    beside = ObjectFolder(bucket)
    proxy.requests.clear()
    proxy.fail = [500_000]

    def change(number: int) -> None:
        if number == 2:
            beside.put("x", CONTENT[::-1])

    proxy.before = change
    if expected:
        with pytest.raises(ChangedObject, match="was changed while it was read"):
            folder.download("x", tmp_path / "x", len(CONTENT), listed.version)
        assert not list(tmp_path.iterdir())
    else:  # begun anew
        folder.download("x", tmp_path / "x", len(CONTENT))
        assert (tmp_path / "x").read_bytes() == CONTENT[::-1]


def test_another_size_or_version_than_expected(bucket: str, tmp_path: Path) -> None:
    folder = ObjectFolder(bucket)
    folder.put("x", CONTENT)
    listed = folder.list()["x"]
    folder.put("x", CONTENT[::-1])
    with pytest.raises(ChangedObject, match="has 1024000 bytes, not 7"):
        folder.download("x", tmp_path / "x", 7)
    with pytest.raises(ChangedObject, match="was changed"):
        folder.download("x", tmp_path / "x", listed.size, listed.version)
    with pytest.raises(WorkError, match="has 1024000 bytes, but may have at most 100"):
        folder.get_bytes("x", 100)
    with pytest.raises(MissingObject, match=f"{bucket}/y does not exist"):
        folder.download("y", tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_requests_are_repeated_until_the_server_is_back(
    bucket: str, proxy: FailingProxy, caplog: pytest.LogCaptureFixture
) -> None:
    folder = impatient(bucket, 30)
    proxy.stop()
    back = Timer(0.7, proxy.start)
    back.start()
    folder.put("x", b"content")
    back.join()
    proxy.fail = ["503", "drop", "503", "drop", "503", "drop"]
    assert list(folder.list()) == ["x"]
    folder.delete("x")
    assert folder.list() == {}


def test_a_server_that_stays_away(bucket: str, proxy: FailingProxy) -> None:
    folder = impatient(bucket, 0.3)
    proxy.stop()
    for use in (folder.list, lambda: folder.put("x", b""), lambda: folder.get_bytes("x", 1)):
        with pytest.raises(
            WorkError, match=r"cannot be reached \(no connection; tried for 0.3 s\)"
        ):
            use()


def test_a_server_that_only_fails(bucket: str, proxy: FailingProxy) -> None:
    proxy.fail = ["503"] * 1000
    with pytest.raises(WorkError, match=r"503 Service Unavailable; tried for 0.3 s"):
        impatient(bucket, 0.3).list()


def test_a_transfer_can_be_stopped(bucket: str, tmp_path: Path) -> None:
    folder = ObjectFolder(bucket)
    folder.put("x", CONTENT)
    stop = Event()
    stop.set()
    with pytest.raises(WorkError, match="the work was stopped"):
        folder.download("x", tmp_path / "x", stop=stop)
    assert not list(tmp_path.iterdir())


def test_a_missing_bucket(bucket: str, tmp_path: Path) -> None:
    folder = ObjectFolder("s3://no-such-bucket/x")
    for use in (
        folder.list,
        lambda: folder.get_bytes("x", 1),
        lambda: folder.put("x", b""),
        lambda: folder.delete("x"),
    ):
        with pytest.raises(WorkError, match="there is no bucket 'no-such-bucket'"):
            use()


def test_wrong_credentials(
    bucket: str, s3_server: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    folder = ObjectFolder(bucket)
    s3_server.reset_auth(0)
    try:
        for use in (
            folder.list,
            lambda: folder.get_bytes("x", 1),
            lambda: folder.put("x", b""),
            lambda: folder.delete("x"),
        ):
            with pytest.raises(WorkError, match=r"access to .* is denied") as error:
                use()
            told = str(error.value) + str(error.value.__cause__) + caplog.text
            assert ACCESS_KEY not in told
            assert SECRET_KEY not in told
    finally:
        s3_server.reset_auth()


def test_no_credentials(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(UserError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        ObjectFolder(bucket)


@pytest.mark.parametrize("endpoint", ["http://me:secret@host", "host:9000", "ftp://host"])
def test_an_endpoint_that_is_none(
    bucket: str, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL must be") as error:
        ObjectFolder(bucket)
    assert "secret" not in str(error.value)


def test_patience_that_is_no_number(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTE_RETRY_SECONDS", "long")
    with pytest.raises(UserError, match="MOTE_RETRY_SECONDS is 'long'"):
        ObjectFolder(bucket)


def test_without_the_extra(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(UserError, match=r"pip install 'mote-video\[cloud\]'"):
        ObjectFolder(bucket)
