"""Holds videos of a list without splits back as a split to test on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from featstore.errors import UserError, counted_of
from pipeline.annotations.listing import Listing, VideoRecord

HELD_OUT: Final = "test"
REST: Final = "train"


def held_out(
    listing: Listing, share: float, earlier: Mapping[str, tuple[str, ...]] | None = None
) -> Listing:
    """Put `share` of the videos of every class into split test, and the others into train.

    Of a class with several videos at least one is held back and one is not. They are drawn by a
    hash of their keys, so the same videos give the same splits. A video that was packed before
    keeps its splits, which `earlier` gives by key; only new ones are drawn.
    Raises UserError for a share that is none, and for videos that have splits or no classes.
    """
    if not 0 < share < 1:
        raise UserError(f"--hold-out {share:g} is no share: give a number between 0 and 1, as 0.2")
    if listing.split_names:
        raise UserError(
            f"--hold-out {share:g} is for videos without splits, and these are in "
            f"{', '.join(listing.split_names)}: leave it out"
        )
    if not listing.class_names:
        raise UserError(
            f"--hold-out {share:g} holds back a share of every class, and these videos have none"
        )
    known = earlier or {}
    of_class: dict[str, list[VideoRecord]] = {}
    for video in (*listing.records, *listing.missing):
        if known.get(video.key):
            video.splits = known[video.key]
        else:
            of_class.setdefault(video.class_name, []).append(video)
    for videos in of_class.values():
        videos.sort(key=lambda video: hashlib.sha256(video.key.encode()).digest())
        count = min(max(1, round(share * len(videos))), len(videos) - 1)
        for place, video in enumerate(videos):
            video.splits = (HELD_OUT if place < count else REST,)
    listed = [video.splits for video in (*listing.records, *listing.missing)]
    held = counted_of(listed.count((HELD_OUT,)), len(listed), "video")
    note = f"{held} held out as split {HELD_OUT}"
    return replace(listing, split_names=[REST, HELD_OUT], notes=[*listing.notes, note])
