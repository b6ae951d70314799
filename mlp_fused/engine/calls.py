"""Run a call: find its path, and run that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..kernels.dropout import draw_seed
from ..reference import Layer
from .autograd import run_layers, run_path
from .layer_path import LayerPath
from .paths import dtype_precision, find_path, wants_gradients
from .settings import Backend, is_intercepted, is_tracing, is_transformed


def run_kernels(
    x: Tensor, layers: Sequence[Layer], dtype: torch.dtype, recompute: bool | None, backend: Backend
) -> Tensor:
    """Run layers on the kernels, x (..., K) -> y, computing in `dtype`, and record the gradients that are wanted."""
    if is_intercepted():
        return run_operator(x, layers, dtype, recompute, backend)
    shape = x.shape
    if x.is_neg():  # a lazily negated view; kernels would read the memory without the negation
        x = x.resolve_neg()
    if len(shape) != 2:
        x = x.reshape(-1, shape[-1])
    weights, biases, *_ = zip(*layers)
    path = find_path(x, layers, dtype, recompute, backend)
    y: Tensor
    if recompute and isinstance(path, LayerPath) and can_checkpoint(x):
        # The seed is drawn here, because the checkpointed function runs twice and has to drop the same elements. The
        # function draws nothing else, so `checkpoint` need not restore a generator (preserve_rng_state), which torch
        # 2.9 cannot do while a graph is captured.
        seed = draw_seed(x.device) if path.drops else None
        y = checkpointed(run_layers, x, weights, biases, path, seed, preserve_rng_state=False)
    else:
        y = run_path(x, weights, biases, path)
    return y if len(shape) == 2 else y.view(*shape[:-1], y.shape[-1])


def run_operator(
    x: Tensor, layers: Sequence[Layer], dtype: torch.dtype, recompute: bool | None, backend: Backend
) -> Tensor:
    """Run layers through the registered operator (ops.py), for compilers and dispatch modes."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y: Tensor
    y, _ = torch.ops.mlp_fused.mlp(
        rows,
        [layer.weight for layer in layers],
        [layer.bias for layer in layers if layer.bias is not None],
        [layer.bias is not None for layer in layers],
        [layer.activation.spec for layer in layers],
        dtype,
        dtype_precision(dtype),
        recompute,
        backend,
        wants_gradients(x, layers),
    )
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def checkpointed(
    function: Callable[..., Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *rest: Any,
    **options: Any,
) -> Tensor:
    """function(x, weights, biases, *rest) under torch's checkpoint: nothing is saved, and backward computes it again.

    The second time, the tensors need gradients as they did the first time, whatever happens to the caller's tensors.

    Args:
        options: options of `torch.utils.checkpoint.checkpoint`.

    Raises:
        RuntimeError: in backward, the input or a parameter was changed in place since the forward.
    """
    if torch.compiler.is_compiling():  # a compiled graph keeps its tensors itself
        compiled: Tensor = checkpoint(function, x, weights, biases, *rest, use_reentrant=False, **options)
        return compiled
    given: tuple[Any, ...] = (x, *weights, *biases)
    # They share memory and versions with the given tensors, but not `.data = …` or `requires_grad_`.
    held = [None if tensor is None else tensor.detach().requires_grad_(tensor.requires_grad) for tensor in given]

    def call(*held: Any) -> Tensor:
        nonlocal given
        (x, *parameters), given = given or held, ()
        return function(x, parameters[: len(weights)], parameters[len(weights) :], *rest)

    output: Tensor = checkpoint(call, *held, use_reentrant=False, **options)
    return output


def can_checkpoint(x: Any) -> bool:
    """True if gradients are recorded, and no transform, tracer or nested tensor rules out torch.utils.checkpoint."""
    return torch.is_grad_enabled() and not (is_transformed() or is_tracing() or getattr(x, "is_nested", False))
