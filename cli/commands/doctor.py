"""`mote-cli doctor`: show what this machine can do."""

from __future__ import annotations

from cli import options
from cli.output import report


def doctor(
    root: options.Root = options.DEFAULT_ROOT,
    json: options.Json = False,
) -> None:
    """Show versions, CPU features, GPU and video decoder, hub access and free disk.

    Example: `mote-cli doctor`
    """
    from pipeline.machine import machine_report

    found = machine_report(root)
    report(
        json,
        found,
        {
            name: ", ".join(f"{k} {v}" for k, v in value.items())
            if isinstance(value, dict)
            else value
            for name, value in found.items()
        },
    )
