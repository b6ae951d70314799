"""Triton, or a stand-in for it where it is not installed; the one place that `triton` and `tl` are imported from.

The stand-in lets the kernels' modules be imported (the activation table is in one); its functions cannot be launched.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

__all__ = ["HAS_TRITON", "INTERPRETED", "INTERPRETER", "TRITON_VERSION", "allocation", "driver", "tl", "triton"]

try:
    import triton
    import triton.language as tl
    from triton.runtime import _allocation as allocation
    from triton.runtime.driver import driver

    HAS_TRITON = True
    TRITON_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
except ImportError:
    HAS_TRITON = False
    TRITON_VERSION = (0, 0)

    class _StandIn:
        """Answers every attribute with itself; as a decorator (`jit`) it returns what it decorates."""

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return self

        def __call__(self, value: Any = None, *_: Any, **__: Any) -> Any:
            return self if value is None else value

    if not TYPE_CHECKING:
        triton = tl = allocation = driver = _StandIn()

# Triton reads the variable when a function is decorated, that is, when this package is imported.
INTERPRETER: bool = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
INTERPRETED = tl.constexpr(INTERPRETER)  # the same, readable inside a kernel
