"""Walks three users through their first hour and records it: docs/first-hour.md.

The clips are those of the generated world, the encoder is the demo's small CLIP, and every command
is run as shown, in a window of 80 columns. Nothing in the output is changed, except that paths of
the temporary folder are cut short.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import common
import numpy as np

from pipeline.demo.small_clip import ENCODER_NAME, make_encoder_folder
from pipeline.demo.world import FRAMES, SpriteClass, draw_world, encode_clip, render_clip
from tests.support.worlds.official_trees import HMDB51_TEN, hmdb51

REPOSITORY = Path(__file__).parents[1]
COLUMNS = 80
CLASSES, TRAIN, VAL = 8, 12, 6  # and videos of a class
HEADER = """# The first hour, recorded

Three users, their commands and what they see in a window of 80 columns. The clips are generated
(moving shapes), the encoder is the small CLIP of the demo, which lies in `mote-data/encoders`; with
real clips leave `--encoder demo-clip` out or name your own. Recorded by
`python benchmarks/record_walks.py` on {machine}.
"""


@dataclass
class Walk:
    """The commands of one user in a folder, and the text of the page."""

    folder: Path
    text: list[str] = field(default_factory=list)

    def say(self, words: str) -> None:
        self.text.append(words + "\n")

    def run(self, line: str, code: int = 0) -> None:
        """Run a line of the shell as a user types it, and keep what the window shows."""
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env={
                **os.environ,
                "COLUMNS": str(COLUMNS),
                "PATH": f"{self.folder}:{os.environ['PATH']}",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        shown = done.stdout.replace(f"{self.folder}/", "")
        wide = [row for row in shown.splitlines() if len(row) > COLUMNS and " " in row.strip()]
        assert done.returncode == code, f"{line}\n{shown}"
        if wide:
            print(f"wider than {COLUMNS}: {line}", *wide, sep="\n  ")
        end = "" if code == 0 else f"[exit code {code}]\n"
        self.text.append(f"```console\n$ {line}\n{shown}{end}```\n")


def sprites(seed: int, count: int) -> list[SpriteClass]:
    """Classes of a world."""
    known = draw_world(seed).known
    return [known[at] for at in np.random.default_rng(seed).permutation(len(known))[:count]]


def clip(path: Path, sprite: SpriteClass, number: int) -> None:
    """Write a clip of a class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    moments = np.linspace(0, 1, FRAMES)
    encode_clip(render_clip(sprite, np.random.default_rng([9, number]), moments), path)


def own_clips(walk: Walk) -> None:
    """Folders of own clips, one of them damaged; a wrong argument; the second run."""
    chosen = sprites(5, CLASSES)
    for c, sprite in enumerate(chosen):
        for i in range(TRAIN + VAL):
            split = "train" if i < TRAIN else "val"
            clip(walk.folder / "clips" / split / sprite.name / f"{i:02}.mp4", sprite, 100 * c + i)
    broken = walk.folder / "clips/train" / chosen[0].name / "03.mp4"
    broken.write_bytes(broken.read_bytes()[:900])
    walk.say("## Folders of own clips")
    walk.say("One file is cut short: it is named, and keeps its place.")
    walk.run("ls clips/train clips/train/* | head -14")
    walk.run("mote-cli pack --dataset my-clips --videos clips")
    walk.run("mote-cli extract --dataset my-clips --encoder demo-clip")
    walk.say("A wrong word costs one line.")
    walk.run("mote-cli train-head --dataset my-clip", 2)
    walk.run("mote-cli train-head --dataset my-clips --name first")
    walk.run("mote-cli eval --closeset my-clips --head first")
    walk.run("mote-cli train-head --dataset my-clips --name probe --head linear")
    walk.run("mote-cli eval --closeset my-clips --head probe")
    walk.run("mote-cli compare first probe")
    walk.run("mote-cli status")


def official_tree(walk: Walk) -> None:
    """The tree and lists of HMDB51, and a head from a file of the released code's layout."""
    tree = hmdb51(walk.folder, HMDB51_TEN)
    walk.say("## HMDB51 and a head from the released code's file")
    walk.say("The tree has HMDB51's names and lists, ten classes, and clips without meaning.")
    walk.run("mote-cli export first --format official --out mote.pt")
    walk.run("mote-cli import-checkpoint mote.pt --name theirs --clip demo-clip")
    lists = next(p.name for p in walk.folder.iterdir() if p.name.startswith("testTrain"))
    walk.run(f"mote-cli pack --dataset hmdb51 --videos {tree.videos.name} --annotations {lists}")
    walk.say("Evaluation names the store it lacks, with the command that makes it.")
    walk.run("mote-cli eval --zeroshot hmdb51 --head theirs", 2)
    walk.run("mote-cli extract --dataset hmdb51 --encoder theirs")
    walk.run("mote-cli eval --zeroshot hmdb51 --head theirs")


def folder_prediction(walk: Walk) -> None:
    """Words of one's own for a folder of clips."""
    chosen = sprites(5, CLASSES)
    for i, sprite in enumerate(chosen[:4]):
        clip(walk.folder / "new" / f"clip {i}.mp4", sprite, 9000 + i)
    (walk.folder / "new/notes.txt").write_text("no video")
    shutil.copy(walk.folder / "new/clip 0.mp4", walk.folder / "new/cut.mp4")
    (walk.folder / "new/cut.mp4").write_bytes((walk.folder / "new/clip 0.mp4").read_bytes()[:700])
    (walk.folder / "words.txt").write_text("".join(f"{s.name}\n" for s in chosen))
    walk.say("## A folder and a list of words")
    walk.run("head -3 words.txt")
    walk.run("mote-cli predict new --head mean --encoder demo-clip --classes words.txt", 1)
    walk.run("mote-cli predict new --head first --classes words.txt --out found.csv", 1)
    walk.run("cat found.csv")
    walk.run("mote-cli predict new --head first --classes words.txt --out found.csv", 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=REPOSITORY / "docs/first-hour.md")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        walk = Walk(Path(folder))
        make_encoder_folder(walk.folder / "mote-data/encoders" / ENCODER_NAME)
        where = common.machine()
        machine = f"{where['name']}, {where['date'][:10]}"
        command = walk.folder / "mote-cli"
        command.write_text(
            f'#!/bin/sh\nPYTHONPATH="{REPOSITORY}" exec "{sys.executable}" -m cli.main "$@"\n'
        )
        command.chmod(0o755)
        try:
            for user in (own_clips, official_tree, folder_prediction):
                user(walk)
        finally:
            page = HEADER.format(machine=machine) + "\n"
            chosen.page.write_text(page + "\n".join(walk.text))


if __name__ == "__main__":
    main()
