"""Official and common annotation formats, read into one `Listing` of videos, classes and splits."""

from __future__ import annotations

from pipeline.annotations.class_names import natural_class_name
from pipeline.annotations.listing import (
    Listing,
    ListingBuilder,
    MissingVideo,
    VideoRecord,
    key_from_name,
    name_from_key,
)
from pipeline.annotations.video_folder import VideoFolder

__all__ = [
    "Listing",
    "ListingBuilder",
    "MissingVideo",
    "VideoFolder",
    "VideoRecord",
    "key_from_name",
    "name_from_key",
    "natural_class_name",
]
