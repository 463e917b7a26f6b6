"""What torch needs in a forked process, where its parent's threads do not exist.

With GNU OpenMP, which torch's wheels bring, a process that is forked after torch used several
threads waits forever in its first operation that would use several. torch's DataLoader tells its
workers to use one; reading a store does the same, because it does not look like a use of torch.
"""

from __future__ import annotations

import os

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_note_fork)


def settle_torch() -> None:
    """Make torch use one thread in a forked process, once, so that more may be set later."""
    global _forked
    if _forked:
        import torch

        torch.set_num_threads(1)
        _forked = False
