"""Docstrings of public names state the equation, the shapes, and the errors."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

import mlp_fused

PUBLIC = {name: getattr(mlp_fused, name) for name in mlp_fused.__all__}
CODE = {name: item for name, item in PUBLIC.items() if inspect.isclass(item) or inspect.isfunction(item)}
COMPUTES = ("Activation", "FusedLinear", "FusedMLP", "Pattern", "Pointwise", "linear_act", "mlp", "register_activation")
TAKES_TENSORS = ("FusedLinear", "FusedMLP", "Pointwise", "linear_act", "mlp")
RECORDS = ("Activation", "CapturedStep", "FuseReport", "Pattern")  # made by functions, which check their arguments


@pytest.mark.parametrize("name", COMPUTES)
def test_the_equation_is_given(name: str) -> None:
    assert re.search(r"\w+ = .*\(", inspect.getdoc(CODE[name]) or "")


@pytest.mark.parametrize("name", TAKES_TENSORS)
def test_the_shapes_are_given(name: str) -> None:
    text = inspect.getdoc(CODE[name]) or ""
    assert "\nShape:\n" in text or ("\nReturns:\n" in text and text.count("(...,") >= 2)


@pytest.mark.parametrize("name", sorted(CODE.keys() - set(RECORDS)))
def test_the_errors_are_given(name: str) -> None:
    """Each error is named with its class."""
    _, _, errors = (inspect.getdoc(CODE[name]) or "").partition("\nRaises:\n")
    assert re.findall(r"^    (\w+Error)\b.*: ", errors, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(CODE))
def test_every_argument_is_described(name: str) -> None:
    """Every argument is named under Args; if there is no Args section, anywhere in the docstring.

    Records, and docstrings that refer to the list of another function, are not checked.
    """
    item: Any = CODE[name]
    text = inspect.getdoc(item) or ""
    if name in RECORDS or re.search(r"[Ss]ee `\w+` for the arguments|`\w+` describes the arguments", text):
        return
    arguments = [
        parameter.name
        for parameter in inspect.signature(item).parameters.values()
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    _, _, described = text.partition("Args:")
    assert [argument for argument in arguments if not re.search(rf"\b{argument}\b", described or text)] == []
