"""mlp_fused/errors.py: how sentences name numbers, lists and errors."""

from __future__ import annotations

import pytest

from mlp_fused.errors import count, first_line, listed


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 rows"), (1, "1 row"), (1.2, "1 row"), (2, "2 rows"), (4096, "4,096 rows")]
)
def test_a_number_has_its_noun(number: float, text: str) -> None:
    assert count(number, "row", ",") == text


def test_thousands_are_set_apart_on_request_only() -> None:
    assert count(1797, "row") == "1797 rows"


def test_a_list_ends_where_it_is_told_to() -> None:
    assert (listed([]), listed("abc"), listed("abc", 2)) == ("none", "a, b, c", "a, b, ...")


def test_an_error_is_its_first_line() -> None:
    assert first_line(ValueError("no room.\nmore")) == "no room"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
