"""Miniature copies of the six official data sets, with the traps of the real ones.

Every builder writes videos and annotation files under a folder and returns what a right reading
of them gives. `one_hot_stores` makes features of packed ones by hand.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from tests.support.worlds.media import make_video


@dataclass
class Tree:
    """A data set on disk and the right reading of it.

    `truth` is the class, in words, of every video that can be packed, by the file's name without
    extension; `splits` the names in every split that there is.
    """

    name: str
    videos: Path
    annotations: Path | None
    classes: tuple[str, ...]
    truth: dict[str, str] = field(default_factory=dict)
    splits: dict[str, set[str]] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)

    def add(self, stem: str, class_name: str, *splits: str) -> None:
        """One more video that can be packed."""
        self.truth[stem] = class_name
        for split in splits:
            self.splits.setdefault(split, set()).add(stem)

    @property
    def pack(self) -> tuple[str | Path, ...]:
        """Arguments of `mote-cli` that pack it."""
        given = () if self.annotations is None else ("--annotations", self.annotations)
        allowed = () if not self.missing else ("--max-failures", "0.5")
        return ("pack", "--dataset", self.name, "--videos", self.videos, *given, *allowed)


def clip(path: Path, number: int) -> None:
    """A short clip; eight different ones are made and copied."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_content(number % 8))


@lru_cache
def _content(number: int) -> bytes:
    return make_video(frames=6, first=50 * number, width=48, height=32, gop=3)


def write(path: Path, text: str) -> None:
    """Write a text file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


# HMDB51: names with every strange character, three overlapping splits, flag 0.

HMDB51 = ("brush hair", "climb stairs", "kick", "kick ball", "sword", "sword exercise")
HMDB51_TEN = (*HMDB51, "talk", "turn", "walk", "wave")
"""Half-class needs five classes in a half."""
_STRANGE = ("April (09)", "Best!Of", "#437 How", "a;b&c", "x[1]+y~z", "2@4 Men's")


def hmdb51(folder: Path, classes: tuple[str, ...] = HMDB51) -> Tree:
    """Six videos per class; of each split three are train, two test and one is unused.

    kick and kick ball, sword and sword exercise are the names that a published file exchanges.
    """
    tree = Tree("hmdb51", folder / "hmdb51_org", None, classes)
    lists = folder / "testTrainMulti_7030_splits"
    number = 0
    for words in classes:
        name = words.replace(" ", "_")
        stems = [f"{start}_{name}_f_cm_np1_ba_med_{i}" for i, start in enumerate(_STRANGE)]
        for i, stem in enumerate(stems):
            clip(tree.videos / name / f"{stem}.avi", number)
            number += 1
            roles = ["111220"[(i + split) % 6] for split in range(3)]
            roles = ["0" if i == 5 else role for role in roles]  # one is in no split at all
            kinds = {"1": "train", "2": "test", "0": ""}
            used = [f"{kinds[role]}{split}" for split, role in enumerate(roles, 1) if role != "0"]
            tree.add(stem, words, *used)
        for split in (1, 2, 3):
            lines = []
            for stem in stems:
                role = (
                    "1"
                    if stem in tree.splits.get(f"train{split}", ())
                    else "2"
                    if stem in tree.splits.get(f"test{split}", ())
                    else "0"
                )
                lines.append(f"{stem}.avi {role} \n")
            write(lists / f"{name}_test_split{split}.txt", "".join(lines))
    return tree


# UCF101: CamelCase, 1-based classInd with CRLF, HandstandPushups spelt two ways.

UCF101_RAW = (
    "ApplyEyeMakeup", "HandstandPushups", "JumpingJack", "TaiChi", "WallPushups", "YoYo",
)  # fmt: skip
UCF101 = (
    "apply eye makeup", "handstand pushups", "jumping jack", "tai chi", "wall pushups", "yo yo",
)  # fmt: skip
UCF101_TEN = {
    **dict(zip(UCF101_RAW, UCF101, strict=True)),
    "Archery": "archery",
    "BasketballDunk": "basketball dunk",
    "PlayingDhol": "playing dhol",
    "Rowing": "rowing",
}


def ucf101(folder: Path, more: bool = False) -> Tree:
    """Six to eight videos per class in groups: a split tests two of them and trains on the rest.

    The first classes have six training videos, the next three five and the others four. `more`
    are ten classes.
    """
    names = dict(list(UCF101_TEN.items())[: None if more else len(UCF101)])
    tree = Tree("ucf101", folder / "UCF-101", None, tuple(names.values()))
    lists = folder / "ucfTrainTestlist"
    write(lists / "classInd.txt", "".join(f"{i} {raw}\r\n" for i, raw in enumerate(names, 1)))
    lines: dict[str, list[str]] = {}
    for label, (raw, words) in enumerate(names.items(), 1):
        spelt = raw.replace("Handstand", "HandStand")
        for i in range(max(6, 8 - label // 3)):
            stem = f"v_{spelt}_g{i + 1:02d}_c01"
            clip(tree.videos / raw / f"{stem}.avi", label + i)
            used = []
            for split in (1, 2, 3):
                tested = i // 2 == split - 1
                used.append(f"{'test' if tested else 'train'}{split}")
                number = "" if tested else f" {label}"
                lines.setdefault(used[-1], []).append(f"{raw}/{stem}.avi{number}\r\n")
            tree.add(stem, words, *used)
    for split in (1, 2, 3):
        write(lists / f"trainlist0{split}.txt", "".join(lines[f"train{split}"]))
        write(lists / f"testlist0{split}.txt", "".join(lines[f"test{split}"]))
    return tree


# Kinetics: CVDF's flat layout, ids with "-" and "_", a replacement, a missing video.

K400 = (
    "abseiling",
    "air drumming",
    "passing American football (in game)",
    "petting animal (not cat)",
    "riding a bike",
    "tasting food",
)


def _youtube_id(number: int) -> str:
    return ("-" if number % 3 == 0 else "_a").ljust(9, "x_-"[number % 3]) + f"{number:02d}"


def _kinetics_row(label: str, youtube_id: str, start: str, end: str, split: str) -> str:
    quoted = f'"{label}"' if "," in label or " " in label else label
    return f"{quoted},{youtube_id},{start},{end},{split}"


def k400(folder: Path) -> Tree:
    """Three training videos per class but for the last (four), two validation ones.

    One training video is corrupted with a replacement beside it, one is gone; test.csv has no
    labels.
    """
    tree = Tree("k400", folder, None, K400)
    rows: dict[str, list[str]] = {"train": [], "val": []}
    number = 0
    for label in K400:
        counts = {"train": 3 + (label == K400[-1]), "val": 2}
        for split, count in counts.items():
            for i in range(count):
                name = _youtube_id(number)
                end = "11.0" if number == 1 else "11"
                row = _kinetics_row(label, name, "1", end, "validate" if split == "val" else split)
                rows[split].append(f"{row},0\n")
                stem = f"{name}_000001_000011"
                path = folder / split / f"{stem}.mp4"
                if label == K400[0] and split == "train" and i == 0:
                    write(path, "corrupted")
                    path = folder / "replacement/replacement_for_corrupted_k400" / path.name
                if label == K400[1] and split == "val" and i == 1:
                    tree.missing.add(stem)
                else:
                    clip(path, number)
                    tree.add(stem, label, split)
                number += 1
    for split, lines in rows.items():
        write(
            folder / f"annotations/{split}.csv",
            "label,youtube_id,time_start,time_end,split,is_cc\n" + "".join(lines),
        )
    write(
        folder / "annotations/test.csv",
        "youtube_id,time_start,time_end,split\nzzzzzzzzzzz,1,11,test\n",
    )
    return tree


K600_RENAMED = ("dyeing hair", "waking up")
K600_UNSEEN = (
    "acting in play",
    "alligator wrestling",
    "bathing dog",
    "calculating",
    "fencing (sport)",
    "jumping bicycle",
    "packing",
    "using a paint roller",
)
K600 = tuple(sorted((*K400, *K600_RENAMED, *K600_UNSEEN)))


def k600(folder: Path) -> Tree:
    """Class folders with underscores, as mmaction2 has them; one val and two test videos a class.

    Six classes are those of Kinetics-400, two are old ones under another name, eight are unseen.
    """
    tree = Tree("k600", folder / "videos", folder / "annotations", K600)
    rows: dict[str, list[str]] = {"val": [], "test": []}
    number = 0
    for label in K600:
        for split, count in (("val", 1), ("test", 2)):
            for _ in range(count):
                name = f"k6{number:02d}_{'-' * 6}"
                rows[split].append(_kinetics_row(label, name, "5", "15", split) + "\n")
                stem = f"{name}_000005_000015"
                clip(tree.videos / split / label.replace(" ", "_") / f"{stem}.mp4", number)
                tree.add(stem, label, split)
                number += 1
    for split, lines in rows.items():
        text = "label,youtube_id,time_start,time_end,split\n" + "".join(lines)
        write(folder / f"annotations/{split}.csv", text)
    return tree


K700 = (
    "abseiling",
    "air drumming",
    "herding cattle, or sheep",
    "massaging person's head",
    "tasting food",
    "using a sledge hammer",
)


def k700(folder: Path) -> Tree:
    """DeepMind's JSON and the CSV of it, files named by id alone, quoted labels with a comma."""
    tree = Tree("k700", folder / "videos", folder / "annotations", K700)
    number = 0
    for split, count in (("train", 2), ("validate", 1)):
        entries = {}
        lines = []
        for label in K700:
            for _ in range(count):
                name = f"_-{number:02d}seven__"
                entries[name] = {
                    "annotations": {"label": label, "segment": [3.0, 13.0]},
                    "duration": 10.0,
                    "subset": split,
                    "url": f"https://example.org/{name}",
                }
                lines.append(_kinetics_row(label, name, "3.0", "13.0", split) + "\n")
                clip(
                    tree.videos / ("train_256" if split == "train" else "val_256") / f"{name}.mp4",
                    number,
                )
                tree.add(name, label, "train" if split == "train" else "val")
                number += 1
        write(folder / f"annotations/{split}.json", json.dumps(entries))
        if split == "train":
            text = "label,youtube_id,time_start,time_end,split\n" + "".join(lines)
            write(folder / f"annotations/{split}.csv", text)
    return tree


# Something-Something V2: templates with brackets, numbers as strings, test without labels.

SSV2_TEMPLATES = (
    "Holding [something]",
    "Holding [something] next to [something]",
    "Moving [something] away from the camera",
    "Pulling [something] from left to right",
    "Pulling [something] from right to left",
    "Pretending to put [something] into [something]",
)
SSV2 = tuple(t.replace("[", "").replace("]", "") for t in SSV2_TEMPLATES)


def ssv2(folder: Path) -> Tree:
    """Five training videos per class but for two with three, two validation videos each."""
    tree = Tree("ssv2", folder / "20bn-something-something-v2", None, SSV2)
    beside = folder / "annotations"
    write(
        beside / "something-something-v2-labels.json",
        json.dumps({name: str(label) for label, name in reversed(list(enumerate(SSV2)))}),
    )
    number = 0
    for split in ("train", "validation"):
        entries = []
        for label, template in enumerate(SSV2_TEMPLATES):
            count = 2 if split == "validation" else 5 - 2 * (label in (1, 4))
            for _ in range(count):
                name = str(70_000 + 17 * number)
                filled = template.replace("[something]", "a cup").lower()
                entries.append(
                    {
                        "id": name,
                        "label": filled,
                        "template": template,
                        "placeholders": ["a cup"] * template.count("[something]"),
                    }
                )
                clip(tree.videos / f"{name}.webm", number)
                tree.add(name, SSV2[label], "train" if split == "train" else "val")
                number += 1
        write(beside / f"something-something-v2-{split}.json", json.dumps(entries))
    write(beside / "something-something-v2-test.json", json.dumps([{"id": "1"}, {"id": "2"}]))
    return tree


TREES: dict[str, Callable[[Path], Tree]] = {
    "k400": k400,
    "k600": k600,
    "k700": k700,
    "hmdb51": hmdb51,
    "ucf101": ucf101,
    "ssv2": ssv2,
}


# Published lists of HMDB51, as a repository has them.


def hmdb51_lists(tree: Tree, folder: Path, *, exchanged: bool = True) -> Path:
    """A clone with `file.avi number` lists of 2 shots and of three seeds of base classes.

    The first three classes are base. With `exchanged` the file of names calls kick "kick ball"
    and sword "sword exercise", and the other way round. Other data sets' lists lie beside.
    """
    swap = {"kick": "kick ball", "kick ball": "kick"}
    swap |= {"sword": "sword exercise", "sword exercise": "sword"}
    names = [swap.get(name, name) if exchanged else name for name in HMDB51]
    header = "id,name\n"
    write(
        folder / "labels/hmdb_51_labels.csv",
        header + "".join(f"{i},{name}\n" for i, name in enumerate(names)),
    )
    base = names[:3]
    write(
        folder / "labels/hmdb_base_labels.csv",
        header + "".join(f"{i},{name}\n" for i, name in enumerate(base)),
    )
    splits = folder / "datasets_splits"
    train = {
        name: sorted(s for s in tree.splits["train1"] if tree.truth[s] == name) for name in HMDB51
    }
    for shots in (2, 16):
        lines = [
            f"{stem}.avi {label}\n"
            for label, name in enumerate(HMDB51)
            for stem in train[name][:shots]
        ]
        write(splits / f"hmdb_splits/train1_few_shot_{shots}.txt", "".join(lines))
    test = sorted(tree.splits["test1"])
    lines = [f"{stem}.avi {HMDB51.index(tree.truth[stem])}\n" for stem in test]
    write(splits / "hmdb_splits/val1.txt", "".join(lines))
    for seed in (1, 2, 3):
        lines = [
            f"{stem}.avi {label}\n"
            for label, name in enumerate(HMDB51[:3])
            for stem in train[name][seed % 2 :]
        ]
        write(splits / f"base2novel_splits/hmdb_splits/train_base_s{seed}.txt", "".join(lines))
    write(splits / "ucf_splits/train1_few_shot_2.txt", "v_TaiChi_g01_c01.avi 0\n")
    write(folder / "README.md", "lists\n")
    return folder
