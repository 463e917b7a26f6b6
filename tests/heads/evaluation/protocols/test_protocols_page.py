"""docs/protocols.md says what the protocols' objects say."""

from __future__ import annotations

from heads.evaluation.protocols.choose import PROTOCOLS
from tests.support.golden.protocol_reference import BEGIN, PAGE, reference


def test_the_page_is_made_of_the_objects() -> None:
    text = PAGE.read_text()
    assert text.partition(BEGIN)[2] == f"\n{reference()}", (
        "run python tests/support/golden/protocol_reference.py"
    )
    assert all(f"`{name}`" in text for name in PROTOCOLS)
