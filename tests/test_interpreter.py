"""The shortcuts through Triton's interpreter agree with its own functions."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

core = pytest.importorskip("triton.language.core", reason="Triton is not installed")
from triton.runtime import interpreter  # noqa: E402

pytestmark = pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="kernels are compiled here")

DTYPES = [core.dtype(name) for name in core.dtype.SINT_TYPES + core.dtype.UINT_TYPES + ["fp16", "bf16", "fp32", "fp64"]]
TYPES = [*DTYPES, *map(core.pointer_type, DTYPES)]
SHAPES = [[16], [16, 32], [32, 16], [1, 16], [core.constexpr(16), 32]]


def without(shortcut):
    """The interpreter's own function."""
    return shortcut.__wrapped__


# The second run reads the caches that the first one filled.
AGAIN = pytest.mark.parametrize("again", [False, True], ids=["first", "again"])


@AGAIN
def test_types_are_described_as_without_shortcuts(again: bool) -> None:
    for scalar in TYPES:
        for shape in SHAPES:
            ours, own = core.block_type(scalar, shape), core.block_type.__new__(core.block_type)
            without(core.block_type.__init__)(own, scalar, shape)
            assert vars(ours) == vars(own)
            assert interpreter._get_np_dtype(ours) == without(interpreter._get_np_dtype)(own)
        assert interpreter._get_np_dtype(scalar) == without(interpreter._get_np_dtype)(scalar)


@AGAIN
def test_tensors_are_described_as_without_shortcuts(again: bool) -> None:
    handle = object()
    for type in [*TYPES, *(core.block_type(scalar, shape) for scalar in TYPES for shape in SHAPES)]:
        ours, own = core.tensor(handle, type), core.tensor.__new__(core.tensor)
        without(core.tensor.__init__)(own, handle, type)
        assert vars(ours).keys() == vars(own).keys()
        assert [(size.value, size.type) for size in ours.shape] == [(size.value, size.type) for size in own.shape]
        assert ours.numel.value == own.numel.value
        assert (ours.handle, ours.type, ours.dtype) == (own.handle, own.type, own.dtype)


@pytest.mark.parametrize("left", [None, *SHAPES], ids=str)
@pytest.mark.parametrize("right", [None, *SHAPES], ids=str)
def test_operands_are_broadcast_as_without_shortcuts(left: list[int] | None, right: list[int] | None) -> None:
    semantic = getattr(interpreter, "interpreter_semantic", None) or pytest.skip("a Triton without this shortcut")
    operands = [operand(shape) for shape in (left, right)]
    broadcast = type(semantic).broadcast_impl_value

    def result(function: Callable[..., Any]) -> object:
        try:
            return [(tensor.type.name, tensor.handle.data.tolist()) for tensor in function(semantic, *operands)]
        except (AttributeError, ValueError) as error:  # shapes that do not fit together
            return str(error)

    assert result(broadcast) == result(without(broadcast))


def operand(shape: list[int] | None) -> Any:
    """A tensor of an interpreted kernel with the elements 0, 1, 2 …; a scalar if `shape` is None."""
    type = core.float32 if shape is None else core.block_type(core.float32, shape)
    sizes = [1] if shape is None else type.shape.values
    data = np.arange(math.prod(sizes), dtype=np.float32).reshape(sizes)
    return core.tensor(interpreter.TensorHandle(data, core.float32), type)


def test_dtypes_compare_as_without_shortcuts() -> None:
    types = [*TYPES, *map(core.dtype, ["fp32", "int8"]), core.constexpr(core.float32), None]
    for one in DTYPES:
        assert [one == other for other in types] == [without(core.dtype.__eq__)(one, other) for other in types]
