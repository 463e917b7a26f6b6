"""Refuses an encoder config with sizes that no CLIP has, before anything of them is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from featstore.errors import UserError, one_line

# Several times the largest of open_clip's models: width 1,792, 56 layers, 512 pixels, 256 tokens
# and 256,000 words. Within these, building a model without its weights takes seconds.
_MOST: Final = {
    "embed_dim": 16_384,
    "width": 16_384,
    "head_width": 16_384,
    "heads": 1_024,
    "layers": 256,
    "image_size": 2_048,
    "patch_size": 2_048,
    "context_length": 4_096,
    "vocab_size": 2**21,
    "mlp_ratio": 64,
}
_MOST_OF_OTHERS: Final = 2**21  # queries, token ids, scales
# A learned table of positions makes a mask of their square; 4,096 of them take 64 MiB.
MOST_POSITIONS: Final = _MOST["context_length"]


def require_sane_sizes(config: Mapping[str, Any], where: str) -> None:
    """Raise UserError, which names `where`, the entry and its limit, for an absurd number.

    All numbers of open_clip's `model_cfg` are looked at, those in lists and inner objects too.
    """
    for name, value in config.items():
        if isinstance(value, Mapping):
            require_sane_sizes(value, where)
            continue
        values = value if isinstance(value, list) else [value]
        most, least = _MOST.get(name, _MOST_OF_OTHERS), 0 if name in _MOST else -_MOST_OF_OTHERS
        for number in values:
            if isinstance(number, int | float) and not least <= number <= most:
                raise UserError(
                    f"{where}: {one_line(name, 40)} is {one_line(repr(number), 40)}, and no CLIP "
                    f"has more than {most} or less than {least}: fetch the file again, and do not "
                    "use it if you do not trust its source"
                )
        if len(values) > len(_MOST):
            raise UserError(
                f"{where}: {one_line(name, 40)} lists {len(values)} values: no CLIP's config does"
            )
