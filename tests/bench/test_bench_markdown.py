"""Numbers in the Markdown of reports."""

from __future__ import annotations

import pytest

from bench.markdown import NONE, number, times


@pytest.mark.parametrize(
    ("value", "text"), [(0.0034174, "0.00342"), (0.66, "0.660"), (2.5, "2.50"), (26.73, "26.7"), (3090.0, "3,090")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text
    assert number(None) == NONE


@pytest.mark.parametrize(("value", "text"), [(0.8168, "0.82x"), (1.994, "1.99x"), (1.996, "2.0x"), (5.09, "5.1x")])
def test_ratios_have_two_decimals_below_2_and_one_from_2_on(value: float, text: str) -> None:
    assert times(value) == text
