"""`mote-cli verify`: check that a store is as it was written, and would come out the same again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import options
from cli.output import Shown, progress_of, report, table, warn

if TYPE_CHECKING:
    from featstore.checking.verify import Reencoding


def verify(
    store: Annotated[
        str,
        typer.Argument(
            metavar="STORE", help="Folder of a store, or its name (STORE or DATASET/STORE)."
        ),
    ],
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every byte and compare every checksum.")
    ] = False,
    reencode: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Encode N random videos again with the recorded encoder, and compare.",
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the choice of --reencode.")] = 0,
    device: options.Device = "auto",
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Check a feature store: files and sizes, with --deep all checksums.

    The store is not changed. Damage is noted beside it: the `mote-cli extract` command that made
    the store then does the damaged partitions again, and only those. With damage, the exit code
    is 1.

    Example: `mote-cli verify ViT-B-16-openai--uniform-16 --deep`
    """
    from featstore.checking.verify import Damage, Report, note_partitions
    from featstore.checking.verify import verify as check
    from featstore.errors import counted, one_line
    from featstore.format.metadata import DamagedMetadata, read_metadata
    from featstore.reading.repair import repair_command

    path = options.store_path(root, store)
    try:
        with progress_of("verify", "partitions") as progress:
            checked = check(path, deep, progress)
        repair = repair_command(path, read_metadata(path), root)
    except DamagedMetadata as error:  # without metadata the partitions are unknown
        damage = (Damage("metadata", one_line(error, limit=1000)),)
        checked, repair = Report(False, deep, 0, 0, 0, damage, ()), ""
    damaged: list[dict[str, Any]] = [vars(finding) for finding in checked.damaged]
    again: Reencoding | None = None
    if reencode and not damaged:
        from heads.prediction.views import encoder_of_store
        from pipeline.extraction.reencode import reencode_store

        on, place = options.device(device), options.workspace(root)
        with progress_of("encode", "videos") as progress:
            more: dict[str, Any] = {"seed": seed, "device": on, "load": encoder_of_store}
            again = reencode_store(path, place, reencode, **more, progress=progress)
        damaged += [
            {
                "partition": row.partition,
                "reason": f"{row.key!r} encoded again has cosine {row.cosine:.6f}, "
                f"at least {again.tolerance} is required",
            }
            for row in again.rows
            if row.cosine < again.tolerance and not row.reason
        ]
    partitions = {f["partition"]: f["reason"] for f in damaged if isinstance(f["partition"], int)}
    note = note_partitions(path, deep, partitions) if repair else None
    ok = not damaged and (again is None or again.ok)

    def shown() -> Iterator[Shown]:
        facts = {
            "store": path,
            "partitions": f"{checked.partitions} done, {len(checked.pending)} not yet",
            "rows": f"{checked.rows_ok} ok, {checked.rows_failed} failed in extraction",
            "checked": "every checksum" if deep else "files and sizes (--deep: every checksum)",
        }
        if again is None:
            yield facts
        else:
            least = min(row.cosine for row in again.rows)
            yield facts | {
                "encoded again": f"{counted(len(again.rows), 'video')}, {again.equal} equal bit "
                f"for bit; least cosine {least:.6f}, at least {again.tolerance} is required"
            }
            yield table(
                "",
                ["encoded again", "partition", "cosine", "largest difference", "equal"],
                [
                    [
                        *(row.key, row.partition, row.reason or f"{row.cosine:.6f}"),
                        *(f"{row.max_abs:.3g}", "yes" if row.equal else "no"),
                    ]
                    for row in again.rows
                ],
            )
        if damaged:
            rows = [[found["partition"], found["reason"]] for found in damaged]
            yield table("", ["damaged partition", "why"], rows)
        if reencode and again is None:
            warn("nothing was encoded again: repair the damage first")
        if partitions:
            yield f"to repair: {repair}"
        elif ok:
            yield "no damage found"

    report(
        json,
        {
            "ok": ok,
            "store": str(path),
            "deep": deep,
            "partitions": checked.partitions,
            "pending": list(checked.pending),
            "rows_ok": checked.rows_ok,
            "rows_failed": checked.rows_failed,
            "damaged": damaged,
            "reencoded": None if again is None else again.to_json(),
            "note": None if note is None else str(note),
            "repair": repair if partitions else None,
        },
        shown(),
    )
    raise typer.Exit(0 if ok else 1)
