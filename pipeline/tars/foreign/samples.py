"""The samples of a tar that somebody else wrote, and what each says about its class.

Members that share their path up to the first dot of the base name are one sample, as WebDataset
has it. Nothing is extracted and nothing is unpickled: of a member only its place is used, and of
text, numbers and JSON the content. The headers may be made to do harm, so every size is checked
against the file before anything is read.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, BinaryIO, Final, NamedTuple

from featstore.errors import WorkError, one_line, quoted
from featstore.files.documents import parse_json
from pipeline.annotations.file_signs import SIGN_BYTES, looks_like_video
from pipeline.annotations.formats.multi_label import LABEL_FIELDS
from pipeline.annotations.listing import key_from_name, printable, refused_name
from pipeline.annotations.tables import TABLES
from pipeline.annotations.video_folder import USUAL_EXTENSIONS, VIDEO_EXTENSIONS
from pipeline.tars.fetching import MAX_VIDEO_BYTES

# A header that holds a long name or a few attributes of a file; Linux allows paths of 4 KiB.
MAX_HEADER_BYTES: Final = 1 << 20
MAX_TEXT_BYTES: Final = 1 << 20
# video2dataset keeps subtitles and all of a page's metadata in the JSON.
MAX_JSON_BYTES: Final = 16 << 20
MAX_CLASS_CHARACTERS: Final = 1000

CLASS_MEMBER: Final = ".cls"
LIST: Final = "list"
"""The `cells` of samples whose classes are a JSON list."""
TAKES_LISTS: Final = "--multi-label list takes lists"
_CLASS_FIELDS: Final = (*TABLES["columns"]["name"], *TABLES["columns"]["label"])
_NO_VIDEOS: Final = frozenset({"json", "txt", "cls", "jpg", "jpeg", "png", "npy", "wav", "mp3"})
_MOST_FIELDS: Final = 50
_BLOCK_BYTES: Final = 1 << 20
_GZIP: Final = b"\x1f\x8b"

Read = Callable[[int, int], bytes]
"""`read(offset, size)` returns the bytes of the tar."""


class UnreadableTar(WorkError):
    """A file that is no tar, or none that can be read by offsets."""


class Member(NamedTuple):
    """A file in a tar: where its bytes are, and why they cannot be used ("" if they can)."""

    name: str
    offset: int
    size: int
    problem: str


@dataclass(slots=True)
class FoundSample:
    """One sample: its video, its class as text, and its caption ("" where it has none).

    `key` is made from its path in the tar up to the first dot, as every data set's. `class_from`
    names what the class comes from: `.cls`, another member or a field of the JSON. `labels` are the
    classes of a sample that may show several, None where nothing says which. `reason` says
    why the sample is no video that can be used, `unread` which text of it could not be read or why
    it names no class. `sha256` and `facts`, what sidecars say of a video, come from
    reading it.
    """

    key: str
    member: str = ""
    offset: int = 0
    size: int = 0
    label: str = ""
    class_from: str = ""
    caption: str = ""
    reason: str = ""
    unread: str = ""
    sha256: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    labels: list[str] | None = None


@dataclass(slots=True)
class FoundSamples:
    """The samples of a tar in its order; `problem` says where the tar breaks off, "" if nowhere.

    `passed_over` are members that belong to no sample, because their names have no extension;
    `fields` counts the names of fields in the JSON of all samples.
    """

    samples: list[FoundSample]
    problem: str
    passed_over: list[str]
    fields: dict[str, int]


def find_samples(file: BinaryIO, class_field: str, cells: str = "") -> FoundSamples:
    """Find the samples of a tar; `class_field` and `cells` as in `classes_in`.

    Raises UnreadableTar if the file is no tar, OSError if it cannot be read.
    """
    members, problem = _members(file)
    from webdataset.tariterators import base_plus_ext  # loads torch

    groups: dict[str, dict[str, Member]] = {}
    repeated: dict[str, str] = {}
    passed_over = []
    for member in members:
        name = member.name.removeprefix("./")
        key, extension = base_plus_ext(name)
        if not key or not extension or (key.startswith("__") and key.endswith("__")):
            passed_over.append(printable(member.name))
            continue
        group = groups.setdefault(key, {})
        if extension.lower() in group:
            repeated.setdefault(key, f"the tar holds {quoted(name, 80)} twice")
        group.setdefault(extension.lower(), member)
    read = partial(_read, file.fileno())
    fields: Counter[str] = Counter()
    asked = class_field, cells
    samples = [_sample(key, group, read, asked, fields) for key, group in groups.items()]
    for name, sample in zip(groups, samples, strict=True):
        sample.reason = repeated.get(name) or sample.reason
    return FoundSamples(samples, problem, passed_over, dict(fields.most_common(_MOST_FIELDS)))


class _BoundedReader:
    """The file that tarfile reads headers from; it would read as many bytes as a header says."""

    def __init__(self, file: BinaryIO, length: int) -> None:
        self._file, self._length = file, length
        self.tell = file.tell

    def seek(self, offset: int) -> None:
        if offset < 0:
            raise tarfile.ReadError("a member of negative size")
        if offset > self._length:
            raise tarfile.ReadError("unexpected end of data")
        self._file.seek(offset)

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


def _members(file: BinaryIO) -> tuple[list[Member], str]:
    """Return all files in a tar, and where it breaks off ("" if it ends as it should)."""
    length = os.fstat(file.fileno()).st_size
    if file.read(2) == _GZIP:
        raise UnreadableTar(
            "is compressed, so that no video in it can be read alone: unpack it with gunzip"
        )
    file.seek(0)
    members: list[Member] = []
    before = -1
    try:
        # tarfile asks for no more than read, seek and tell.
        with tarfile.open(fileobj=_BoundedReader(file, length), mode="r:") as tar:  # type: ignore[call-overload]
            while (member := tar.next()) is not None:
                if tar.offset <= before or member.size < 0:
                    raise tarfile.ReadError("a member of negative size")
                before = tar.offset
                tar.members.clear()  # else all headers stay in memory
                if not member.isdir():
                    members.append(_member(member, length))
            problem = _wrong_end(file, tar.offset)
        if problem and not members:
            raise UnreadableTar(f"is no tar ({problem})")
    except (tarfile.TarError, RecursionError, ValueError, OverflowError) as error:
        if not members:
            raise UnreadableTar(f"is no tar ({one_line(error)})") from error
        problem = one_line(error)
    if problem and members:
        last = one_line(printable(members[-1].name), 80)
        problem = f"it breaks off after {last!r} ({problem})"
    return members, problem


def _wrong_end(file: BinaryIO, offset: int) -> str:
    """Return what is wrong with the end of a tar at this byte; "" if only zeros follow.

    tarfile takes a damaged header and a hole of zeros for the end.
    """
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if not block:
        return "it has no end mark"
    if block.strip(b"\0"):
        return f"no header at byte {offset}"
    while block := file.read(_BLOCK_BYTES):
        if block.strip(b"\0"):
            return f"more data follows its end mark at byte {offset}"
    return ""


def _member(member: tarfile.TarInfo, length: int) -> Member:
    problem = ""
    if not member.isreg():
        problem = "is a link or a device, no file"
    elif member.sparse is not None:
        problem = "is stored as a sparse file"
    elif member.offset_data + member.size > length:
        problem = f"is cut off: the tar ends inside it (it says {member.size} bytes)"
    return Member(member.name, member.offset_data, member.size, problem)


def _sample(
    name: str, group: dict[str, Member], read: Read, asked: tuple[str, str], fields: Counter[str]
) -> FoundSample:
    sample = FoundSample(key_from_name(name))
    kinds = ", ".join(one_line(printable(end), 40) for end in sorted(group))
    videos = _videos(group, read)
    if len(videos) == 1:
        video = videos[0]
        sample.member, sample.offset, sample.size = printable(video.name), *video[1:3]
        if video.problem:
            sample.reason = f"its video {video.problem}"
        elif not video.size:
            sample.reason = "the file is empty (zero bytes)"
        elif video.size > MAX_VIDEO_BYTES:
            sample.reason = f"its video has {video.size} bytes, more than {MAX_VIDEO_BYTES}"
    elif videos:
        sample.member = printable(videos[0].name)
        sample.reason = f"it has {len(videos)} videos (members: {kinds}); a sample has one"
    else:
        sample.reason = f"it has no video (members: {kinds})"
    if refusal := _refused_key(name):
        sample.reason = refusal
    facts, wrong_json = _json(group.get("json"), read)
    fields.update(one_line(printable(field), 40) for field in islice(facts, _MOST_FIELDS))
    caption = _text(group.get("txt"), read)[0] or facts.get("caption")
    sample.caption = printable(caption) if isinstance(caption, str) else ""
    texts = {end: partial(_text, member, read) for end, member in group.items()}
    found, sample.class_from, no_class = classes_in(*asked, texts, facts)
    if asked[1]:
        sample.labels = found
    elif found:
        sample.label = found[0]
    sample.unread = wrong_json or no_class
    return sample


def _videos(group: dict[str, Member], read: Read) -> list[Member]:
    """Return the members that are videos by their extension, else by their first bytes.

    Previews such as .gif do not count beside a video.
    """
    for extensions in (USUAL_EXTENSIONS, VIDEO_EXTENSIONS):
        if found := [m for end, m in group.items() if end.rpartition(".")[2] in extensions]:
            return found
    unknown = [m for end, m in group.items() if end not in _NO_VIDEOS and not m.problem]
    return [m for m in unknown if looks_like_video(read(m.offset, min(m.size, SIGN_BYTES)))]


def _refused_key(key: str) -> str:
    if key.startswith("/") or ".." in key.split("/"):
        return "its name leads out of the tar: rename the member"
    return refused_name(key)


def classes_in(
    class_field: str,
    cells: str,
    texts: Mapping[str, Callable[[], tuple[str, str]]],
    facts: Mapping[str, Any],
) -> tuple[list[str] | None, str, str]:
    """Return the classes of a sample as texts, what they come from, and why there are none.

    `class_field` names a member (`.cls`, `.txt`) or a field of the JSON (`label`, `meta.label`), or
    is "" for `.cls` and otherwise the first of the usual fields. `cells` is "" where a sample has
    one class, else what parts several in a text: "|", ";", or `LIST` for a text that is a JSON
    list; a field that is a list needs nothing to part it. Then [] says that a sample shows none.
    `texts` read the members by their extension, `facts` is the JSON.
    """
    value, name, problem = _class_value(class_field, bool(cells), texts, facts)
    if value is None:
        return None, name, problem or (name and f"{name} is empty")
    if not cells:
        text, problem = _class_text(value, name)
        return (None, name, problem) if problem else ([text], name, "")
    if cells == LIST and isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value.encode(), foreign=True)
        except ValueError as error:
            return None, name, f"{name} is no JSON list ({one_line(error, 80)})"
    if not isinstance(value, list):
        several = isinstance(value, str) and cells != LIST
        value = value.split(cells) if several else [value]
    labels: dict[str, None] = {}
    for each in value:
        if isinstance(each, str) and not each.strip():
            continue
        text, problem = _class_text(each, name)
        if problem:
            return None, name, problem
        labels[text] = None
    return list(labels), name, ""


def _class_value(
    class_field: str,
    several: bool,
    texts: Mapping[str, Callable[[], tuple[str, str]]],
    facts: Mapping[str, Any],
) -> tuple[Any, str, str]:
    """Return what says the class of a sample (None: nothing), its name, and why there is none."""
    if class_field.startswith("."):
        chosen = class_field
    elif class_field and (
        class_field.lower() not in texts or _field(facts, class_field) is not None
    ):
        return _field(facts, class_field), class_field, f"its JSON has no {class_field!r}"
    elif class_field or CLASS_MEMBER[1:] in texts:
        chosen = f".{class_field}" if class_field else CLASS_MEMBER
    else:
        usual = (*LABEL_FIELDS, *_CLASS_FIELDS) if several else _CLASS_FIELDS
        known = (name for name in usual if _is_class(facts.get(name), several))
        name = next(known, "")
        return facts.get(name) if name else None, name, ""
    if chosen[1:].lower() not in texts:
        return None, chosen, f"it has no {chosen}"
    text, problem = texts[chosen[1:].lower()]()
    return (None if problem else text), chosen, problem


def _field(facts: Mapping[str, Any], path: str) -> Any:
    """Return the value of a field, or of a nested one, `meta.label`; None if there is none."""
    if path in facts:
        return facts[path]
    value: Any = facts
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _is_class(value: Any, several: bool = False) -> bool:
    if several and isinstance(value, list):
        return True
    return isinstance(value, str | int) and not isinstance(value, bool)


def _class_text(value: Any, name: str) -> tuple[str, str]:
    """Return the text of one class, or why it is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas makes floats of a column of numbers with gaps
    if not _is_class(value):
        several = f"; {TAKES_LISTS}" if isinstance(value, list) else ""
        said = f"{name} is {one_line(repr(value), 60)}, neither a name nor a number{several}"
        return "", said
    text = " ".join(str(value).split())
    if not text or text == "-1":  # test sets without labels have -1
        return "", f"{name} is {text or 'empty'}"
    if len(text) > MAX_CLASS_CHARACTERS:
        return "", f"{name} has {len(text)} characters: a class has {MAX_CLASS_CHARACTERS}"
    if not text.isprintable():
        return "", f"{name} holds control characters"
    return text, ""


def _json(member: Member | None, read: Read) -> tuple[dict[str, Any], str]:
    """Return the JSON object of a sample, {} if it has none, and why it cannot be read."""
    content, problem = _content(member, read, MAX_JSON_BYTES)
    if member is None or problem:
        return {}, problem
    try:
        value = parse_json(content, foreign=True)
    except ValueError as error:
        return {}, f"its json is not JSON ({one_line(error, 80)})"
    return (value, "") if isinstance(value, dict) else ({}, "its json is not a JSON object")


def _text(member: Member | None, read: Read) -> tuple[str, str]:
    """Return the text of a member, "" if there is none, and why it cannot be read."""
    content, problem = _content(member, read, MAX_TEXT_BYTES)
    try:
        return content.decode("utf-8-sig").strip(), problem
    except UnicodeDecodeError:
        assert member is not None
        return "", f"{one_line(printable(member.name), 80)} is not UTF-8 text"


def _content(member: Member | None, read: Read, limit: int) -> tuple[bytes, str]:
    if member is None:
        return b"", ""
    if member.problem or member.size > limit:
        problem = member.problem or f"has {member.size} bytes, more than {limit}"
        return b"", f"{one_line(printable(member.name), 80)} {problem}"
    return read(member.offset, member.size), ""


def _read(descriptor: int, offset: int, size: int) -> bytes:
    return os.pread(descriptor, size, offset)
