"""`mote-cli doctor`: show what this machine can do, and what to do next."""

from __future__ import annotations

from cli import options
from cli.output import report

LISTED_STEPS = 3


def doctor(
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Show versions, CPU features, GPU and video decoder, hub access and free disk.

    At the end stands what to do next in the workspace.

    Example: `mote-cli doctor`
    """
    from heads.inventory.contents import workspace_contents
    from heads.inventory.missing import next_steps
    from pipeline.machine import machine_report

    found = machine_report(root)
    steps = next_steps(workspace_contents(options.workspace(root).root))
    lines = [f"next: {step.line}" for step in steps[:LISTED_STEPS]]
    if len(steps) > LISTED_STEPS:
        lines.append(f"{len(steps) - LISTED_STEPS} more: `mote-cli status`")
    facts = {
        name: ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        for name, value in found.items()
    }
    report(
        json,
        {**found, "next": [vars(step) for step in steps]},
        [facts, *(lines or ["next: nothing is missing"])],
    )
