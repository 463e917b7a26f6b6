"""Finds the plain paths of the videos of a packed data set."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from featstore.errors import UserError, WorkError
from featstore.files.tables import csv_rows
from pipeline.tars.dataset import FAILURES_FILE, load_dataset
from pipeline.tars.finished import RECORDS_FOLDER
from pipeline.tars.plan import PLAN_FILE, read_plan
from pipeline.tars.reading import open_packed

log = logging.getLogger(__name__)


def video_paths(dataset_dir: Path) -> dict[str, str]:
    """Return the path of every listed video by its key; {} if the data set is not packed here.

    A path is relative to the folder of videos that was packed, or a URL; in a tar that was taken
    where it lies it is the name of the member. It comes from the plan of packing or, where that was
    not kept, from the JSON beside each video in the tars (or the index of such a tar) and from
    failures.csv.
    A tar that is missing or damaged is logged, and its videos are left out.
    """
    with suppress(UserError, WorkError):
        return {v.key: v.path for v in read_plan(dataset_dir / RECORDS_FOLDER / PLAN_FILE).videos}
    try:
        dataset = load_dataset(dataset_dir)
    except UserError:
        return {}
    found: dict[str, str] = {}
    with suppress(OSError, ValueError):
        _, *failures = csv_rows((dataset_dir / FAILURES_FILE).read_bytes())
        found.update((key, path) for key, path, *_ in failures)
    for tar in dataset.tars:
        try:
            with open_packed(dataset, tar) as archive:
                for sample in archive.samples:
                    path = sample.sidecar.get("source_path") or sample.sidecar.get("member")
                    found[sample.key] = str(path or "")
        except WorkError as error:
            log.warning("paths are left out: %s", error)
    return found
