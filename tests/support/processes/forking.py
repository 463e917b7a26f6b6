"""Runs `mote-cli` in processes of its own that start at once; used by processes.py beside it.

Reads one JSON line per command, {"arguments", "out", "err", "environment"}, answers {"pid"} when it
has started and {"pid", "code"} when it has ended (negative: the signal). Loading torch takes
seconds, so it happens here, once, and every command is a fork of this process.
"""

from __future__ import annotations

import json
import os
import select
import sys

import av  # noqa: F401
import open_clip  # noqa: F401
import torch

import heads.end_to_end.finetune
import heads.training.train_head  # noqa: F401
import pipeline.extraction.run
import pipeline.tars.packing  # noqa: F401
from cli.main import main


def run(arguments: list[str], out: str, err: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    for path, descriptor in ((os.devnull, 0), (out, 1), (err, 2)):
        flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(path, flags, 0o644), descriptor)
    torch.set_num_threads(1)
    sys.argv = ["mote-cli", *arguments]
    main()


def answer(**values: int) -> None:
    print(json.dumps(values), flush=True)


pids: dict[int, int] = {}  # by descriptor
unread = b""
reading = True
while reading or pids:
    for ready in select.select([0] * reading + list(pids), [], [])[0]:
        if ready:
            pid = pids.pop(ready)
            os.close(ready)
            answer(pid=pid, code=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            continue
        read = os.read(0, 65536)
        reading = bool(read)
        *lines, unread = (unread + read).split(b"\n")
        for line in lines:
            pid = os.fork()
            if pid == 0:
                run(**json.loads(line))
                raise AssertionError("main() must exit")
            pids[os.pidfd_open(pid)] = pid
            answer(pid=pid)
