"""Triton, or a stand-in where it cannot be imported. Every other module imports `triton` and `tl` from here.

With the stand-in, the kernels' modules can still be imported (one of them has the activation table). Kernels cannot
be launched.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

__all__ = [
    "HAS_TRITON",
    "INTERPRETED",
    "INTERPRETER",
    "JIT_FUNCTION",
    "NOT_INSTALLED",
    "ROWS_OF_16_ELEMENTS",
    "TRITON_VERSION",
    "WHY_NO_TRITON",
    "allocation",
    "driver",
    "tl",
    "triton",
]

NOT_INSTALLED = "Triton is not installed"
OLDEST = "3.5"  # pyproject.toml requires the same, but on Linux only


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(map(int, version.split(".")[:2]))


def _why(error: Exception) -> str:
    """The reason to run without Triton, as errors, `explain` and `mlp-fused env` state it."""
    if isinstance(error, ModuleNotFoundError) and error.name == "triton":
        return NOT_INSTALLED
    return f"Triton cannot be used: {type(error).__name__}: {' '.join(str(error).split())}"


# The module `triton` may come from another distribution, such as triton-windows, so no distribution's name is checked.
WHY_NO_TRITON: str | None = None
try:
    import triton

    TRITON_VERSION = _numbers(triton.__version__)
    if _numbers(OLDEST) > TRITON_VERSION:
        raise ImportError(f"its version is {triton.__version__}; the kernels need {OLDEST} or newer")
    import triton.language as tl
    from triton.runtime import _allocation as allocation
    from triton.runtime.driver import driver
except Exception as error:  # not only ImportError: a broken installation raises OSError for a missing library
    WHY_NO_TRITON = _why(error)
    TRITON_VERSION = (0, 0)

    class _StandIn:
        """Stands for any attribute of Triton. Used as a decorator (`jit`), it returns the function unchanged."""

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return self

        def __call__(self, value: Any = None, *_: Any, **__: Any) -> Any:
            return self if value is None else value

    if not TYPE_CHECKING:
        triton = tl = allocation = driver = _StandIn()

HAS_TRITON = WHY_NO_TRITON is None
# Triton reads the variable when a function is decorated, that is, when this package is imported.
INTERPRETER: bool = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
INTERPRETED = tl.constexpr(INTERPRETER)  # the same, readable inside a kernel

# Rows in a tensor descriptor need a multiple of 16 bytes; in Triton 3.5's interpreter, a multiple of 16 elements.
ROWS_OF_16_ELEMENTS = INTERPRETER and TRITON_VERSION < (3, 6)


@triton.jit
def _decorated():
    pass


# Under the interpreter this is another class. In Triton 3.5 the two have no common base.
JIT_FUNCTION: Any = type(_decorated)
