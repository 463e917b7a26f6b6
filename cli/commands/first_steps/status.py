"""`mote-cli status`: show what a workspace holds and what is missing in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cli import options
from cli.output import percent, report
from featstore.errors import counted
from featstore.files.disk import in_bytes

if TYPE_CHECKING:
    from heads.inventory.contents import (
        Contents,
        HeldDataset,
        HeldEncoder,
        HeldHead,
        HeldStore,
    )

_ROLES = {"closeset": "close-set", "zeroshot": "zero-shot", "halfclass": "half-class"}


def status(
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Show what the workspace holds, how large it is, and what is missing for what.

    Data sets, stores, heads with their newest results, and encoders are listed. What cannot be
    read gets a line with the reason. At the end stand the commands that make what is missing.

    Example: `mote-cli status`
    """
    from heads.inventory.contents import workspace_contents

    report_contents(json, workspace_contents(options.workspace(root).root))


def report_contents(json: bool, contents: Contents) -> None:
    """Print what a workspace holds, as `status` does."""
    from heads.inventory.missing import next_steps

    steps = next_steps(contents)
    value = {**contents.to_json(), "next": [vars(step) for step in steps]}
    report(json, value, _shown(contents, [step.line for step in steps]))


def _shown(contents: Contents, steps: list[str]) -> Iterator[str]:
    yield f"workspace {contents.workspace.root}, {in_bytes(contents.bytes)}"
    for kind, facts in (
        ("data set", map(_dataset_facts, contents.datasets)),
        ("store", map(_store_facts, contents.stores)),
        ("head", map(_head_facts, contents.heads)),
        ("encoder", map(_encoder_facts, contents.encoders)),
    ):
        for name, *lines in facts:
            yield f"{kind} {name}"
            yield from (f"  {line}" for line in lines if line)
    yield from (f"problem: {each.path}: {each.reason}" for each in contents.problems)
    yield from (f"next: {step}" for step in steps or ["nothing is missing"])


def _dataset_facts(dataset: HeldDataset) -> tuple[str | None, ...]:
    splits = ", ".join(f"{name} {count}" for name, count in dataset.splits.items())
    return (
        f"{dataset.name}, {in_bytes(dataset.bytes)}",
        f"{counted(dataset.videos, 'video')}, {dataset.failed} failed; "
        f"{counted(dataset.classes, 'class', 'classes')}",
        splits and f"splits: {splits}",
    )


def _store_facts(store: HeldStore) -> tuple[str | None, ...]:
    made, schema = store.metadata.provenance, store.metadata.schema
    done = "complete" if store.complete else f"{store.tars_done} of {counted(schema.tars, 'tar')}"
    tier = "" if schema.pooled else schema.tier
    tier = "vectors of views" if made.of_views else tier
    stored = "" if schema.storage == "float16" else schema.storage
    shape = f"{counted(schema.views, 'view')} of {counted(schema.frames, 'frame')}"
    if schema.sequences:
        shape = f"sequences of {counted(schema.views, 'crop')}"
    return (
        f"{store.dataset}/{store.name}, {done}, {in_bytes(store.bytes)}",
        ", ".join(filter(None, (made.encoder, made.sampling, made.split, tier, stored))),
        f"{counted(store.rows_ok + store.rows_failed, 'row')}, {store.rows_failed} failed; {shape}",
        store.busy and f"in use by {store.busy}",
    )


def _head_facts(head: HeldHead) -> tuple[str | None, ...]:
    trained = f"trained on {head.origin.get('dataset') or 'something that is not recorded'}"
    if not head.settings:
        trained = "results without a head"
    elif not head.finished:
        trained += f": {head.trained}"
    if head.protocol:
        trained += f" by {head.protocol}"
    newest = head.to_json()["newest"]
    return (
        f"{head.name}, {in_bytes(head.bytes)}",
        trained,
        *(
            f"{_ROLES.get(role, role)} {percent(found.get('top1', found.get('mean_ap')))} %"
            f"{' mAP' * ('mean_ap' in found)} on {found['dataset']}, "
            f"{found['when'][:16].replace('T', ' ')}"
            for role, found in newest.items()
        ),
        "" if newest or not head.finished else "never evaluated",
        head.busy and f"in training by {head.busy}",
    )


def _encoder_facts(encoder: HeldEncoder) -> tuple[str | None, ...]:
    return (f"{encoder.name}, {in_bytes(encoder.bytes)}", encoder.architecture or "")
