"""The check of every kind of golden file of DiST (tests/data/golden_dist/README.md)."""

from __future__ import annotations
from collections.abc import Callable, Iterator
from pathlib import Path
from tests.support.golden.checks import Kinds
from tests.support.golden.dist.branch import check_branch, check_parameters
from tests.support.golden.dist.files import check_checkpoints, check_e2e
from tests.support.golden.dist.inputs import check_frame_indices, check_preprocess, check_tokens
from tests.support.golden.dist.model import check_intermediates, check_model
from tests.support.golden.dist.training import check_lr_schedules, check_sampler, check_trainstep

DIST_KINDS: Kinds = {
    "dist_model_*.npz": check_model,
    "dist_intermediates_*.npz": check_intermediates,
    "dist_branch_*.npz": check_branch,
    "dist_trainstep_*.npz": check_trainstep,
    "dist_lr_schedules*.npz": check_lr_schedules,
    "dist_frame_indices*.json": check_frame_indices,
    "dist_preprocess*.npz": check_preprocess,
    "dist_tokens*.npz": check_tokens,
    "dist_parameters*.json": check_parameters,
    "dist_sampler*.json": check_sampler,
    "ckpt/expected.npz": check_checkpoints,
    "e2e/branch_state.npz": check_e2e,
}
"""Check of every kind of file, by the pattern of its name."""
