"""Hooks that fail in their nth call, by default with an out-of-memory error."""

from __future__ import annotations

from collections.abc import Callable

import torch

TORCH_MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."


def run_out(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError(TORCH_MESSAGE)


def on_call(call: int, then: Callable[..., object] = run_out) -> Callable[..., None]:
    """A hook that calls `then` in its nth call."""
    remaining = [call]

    def hook(*_: object) -> None:
        remaining[0] -= 1
        if remaining[0] == 0:
            then()

    return hook
