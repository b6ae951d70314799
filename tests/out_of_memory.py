"""Hooks that run out of memory in their nth call."""

from __future__ import annotations

from collections.abc import Callable

import torch

TORCHS = "CUDA out of memory. Tried to allocate 2.00 GiB."


def run_out(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError(TORCHS)


def at(call: int, then: Callable[..., object] = run_out) -> Callable[..., None]:
    """A hook that runs out of memory in its nth call."""
    left = [call]

    def hook(*_: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            then()

    return hook
