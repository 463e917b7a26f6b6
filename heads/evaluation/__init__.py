"""The evaluation of heads, from a protocol's name to a result that can stand beside another.

It may import every other part of `heads`; none of them but `heads/__init__.py` imports it, so that
models and training know nothing of protocols (docs/decisions/0021). What is tested: `protocols`,
with the rules in `protocol_data` and `protocol_types`. How: `evaluating`, over `measuring`. What
comes of it: `results` and `outcomes`, put side by side by `comparing`, `published` and `tradeoff`.
Protocols that train before they test: `shot_plans` and `trained_protocols`.
"""

from __future__ import annotations

from heads.evaluation.protocols.half_class import half_class_accuracy

__all__ = ["half_class_accuracy"]
