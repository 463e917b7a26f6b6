"""Why stores cannot become one, and that what the error says to do works."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from featstore import UserError, verify
from featstore.rewriting.convert import convert
from featstore.rewriting.merge import merge
from featstore.rewriting.quantize import quantize
from tests.support.stores.growing_stores import make_other_store, make_small_store


def test_what_differs_is_told_by_order(tmp_path: Path) -> None:
    """The stores of two data sets have one file name as a rule."""
    one, two = tmp_path / "one/vit--uniform-4.zarr", tmp_path / "two/vit--uniform-4.zarr"
    make_small_store(one)
    make_other_store(two, sampling="uniform:8")
    with pytest.raises(UserError) as error:
        merge([one, two], tmp_path / "m.zarr")
    assert re.search(r"sampling: the first has \S+, the second has uniform:8", str(error.value))
    assert "extract one of them" in str(error.value)
    assert "convert" not in str(error.value)


def test_another_codec_or_int8_has_its_own_remedy(tmp_path: Path) -> None:
    one, two = tmp_path / "one.zarr", tmp_path / "two.zarr"
    make_small_store(one)
    make_other_store(two)
    convert(two, tmp_path / "z.zarr", "zstd")
    with pytest.raises(UserError, match=r"codec: the first has none, the second has zstd") as error:
        merge([one, tmp_path / "z.zarr"], tmp_path / "m.zarr")
    small = f"--codec none --out {tmp_path / 'z-none.zarr'}`"
    convert_it = f"`mote-cli store convert {tmp_path / 'z.zarr'} {small}"
    assert str(error.value).endswith(f"convert the second with {convert_it}")
    quantize(one, tmp_path / "q1.zarr")
    quantize(two, tmp_path / "q2.zarr")
    with pytest.raises(UserError, match="both are int8, with a scale of its own") as error:
        merge([tmp_path / "q1.zarr", tmp_path / "q2.zarr"], tmp_path / "m.zarr")
    assert "q1.zarr and " in str(error.value)
    assert "q2.zarr cannot" in str(error.value)
    with pytest.raises(UserError, match="the second is int8"):
        merge([one, tmp_path / "q2.zarr"], tmp_path / "m.zarr")
    # What the message says to do works.
    convert(tmp_path / "z.zarr", tmp_path / "back.zarr", "none")
    merge([one, tmp_path / "back.zarr"], tmp_path / "m.zarr")
    quantize(tmp_path / "m.zarr", tmp_path / "mq.zarr")
    assert verify(tmp_path / "mq.zarr", deep=True).ok
