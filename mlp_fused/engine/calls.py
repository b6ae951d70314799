"""Run a call: find its path, and run that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..kernels.dropout import draw_seed
from ..reference import Layer
from .autograd import refuse_changed, run_layers, run_path, versions
from .layer_path import LayerPath
from .paths import dtype_precision, find_path, wants_gradients
from .section import parameter_names
from .settings import Backend, is_intercepted, is_transformed


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
        y = checkpointed(run_layers, (*weights, *biases), x, weights, biases, path, seed, preserve_rng_state=False)
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
    function: Callable[..., Tensor], parameters: Sequence[Tensor | None], *arguments: Any, **options: Any
) -> Tensor:
    """function(*arguments) under torch's checkpoint: nothing is saved, and backward calls the function again.

    Args:
        parameters: the weights and biases that the function reads.
        options: options of `torch.utils.checkpoint.checkpoint`.

    Raises:
        RuntimeError: in backward, a parameter was changed in place since the forward.
    """
    if torch.compiler.is_compiling():  # a compiled graph takes parameters as arguments
        compiled: Tensor = checkpoint(function, *arguments, use_reentrant=False, **options)
        return compiled
    before, names = versions(parameters), parameter_names(0, len(parameters) // 2)

    def call(*arguments: Any) -> Tensor:
        refuse_changed(names, before, versions(parameters))
        return function(*arguments)

    output: Tensor = checkpoint(call, *arguments, use_reentrant=False, **options)
    return output


def can_checkpoint(x: Any) -> bool:
    """True if gradients are recorded, and neither torch.func nor a nested tensor rules out torch.utils.checkpoint."""
    return torch.is_grad_enabled() and not is_transformed() and not getattr(x, "is_nested", False)
