"""mlp_fused/errors.py: texts for numbers, lists and errors, and checks of numbers."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from mlp_fused.errors import count, first_line, listed, real_number, whole_number


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 rows"), (1, "1 row"), (1.2, "1 row"), (2, "2 rows"), (4096, "4,096 rows")]
)
def test_a_number_has_its_noun(number: float, text: str) -> None:
    assert count(number, "row", ",") == text


def test_thousands_separators_only_on_request() -> None:
    assert count(1797, "row") == "1797 rows"


def test_a_long_list_is_cut_at_the_limit() -> None:
    assert (listed([]), listed("abc"), listed("abc", 2)) == ("none", "a, b, c", "a, b, ...")


def test_an_error_is_shown_by_its_first_line() -> None:
    assert first_line(ValueError("no room.\nmore")) == "no room"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"


class Indexed:
    def __index__(self) -> int:
        return 5


WHOLE = {
    "int": 5,
    "int64": np.int64(5),
    "uint8": np.uint8(5),
    "array": np.array(5),
    "tensor": torch.tensor(5),
    "tensor of one": torch.tensor([5]),
    "uint16 tensor": torch.tensor(5, dtype=torch.uint16),
    "__index__": Indexed(),
}
REAL = {
    "float": 0.5,
    "float64": np.float64(0.5),
    "float32": np.float32(0.5),
    "array": np.array(0.5, np.float16),
    "tensor": torch.tensor(0.5),
    "bfloat16 tensor": torch.tensor(0.5, dtype=torch.bfloat16),
    "fraction": Fraction(1, 2),
}
NEITHER = {
    "bool": True,
    "numpy bool": np.bool_(True),
    "bool array": np.array(True),
    "bool tensor": torch.tensor(True),
    "text": "5",
    "numpy text": np.str_("5"),
    "None": None,
    "complex": 5j,
    "complex tensor": torch.tensor(5j),
    "array of two": np.array([5, 5]),
    "tensor of two": torch.tensor([5, 5]),
    "list": [5],
}


@pytest.mark.parametrize("value", WHOLE.values(), ids=WHOLE)
def test_an_object_with_index_is_a_whole_number(value: object) -> None:
    for number in (whole_number(value), real_number(value)):
        assert number == 5
        assert type(number) is int


@pytest.mark.parametrize("value", REAL.values(), ids=REAL)
def test_a_real_number_is_a_python_float(value: object) -> None:
    assert real_number(value) == 0.5
    assert type(real_number(value)) is float
    assert whole_number(value) is None


@pytest.mark.parametrize("value", NEITHER.values(), ids=NEITHER)
def test_bools_text_and_arrays_are_not_numbers(value: object) -> None:
    assert whole_number(value) is None
    assert real_number(value) is None
