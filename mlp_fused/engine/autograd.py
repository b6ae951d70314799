"""What both paths share around their autograd.Functions: gradients as kernels read them, and differentiated ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.activation import Activation
from ..kernels.activations import ACTIVATIONS
from ..kernels.dropout import Dropout
from ..kernels.layer_forward import pointwise
from .settings import is_batched, is_transformed, is_zero_tensor

__all__ = [
    "PlainFunction", "differentiable_backward", "dropout_factors", "dropped", "plain_gradient", "restore", "save",
    "through", "versions", "wants_torch",
]  # fmt: skip


class PlainFunction(torch.autograd.Function):
    """An autograd.Function of plain tensors alone."""

    @classmethod
    def call(cls, *arguments: Any) -> Any:
        """`apply` without its search for tensors of torch.func transforms, which never come here: 2 µs less."""
        return super(torch.autograd.Function, cls).apply(*arguments)  # type: ignore[misc]


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """Save tensors for backward. None is left out: graph drawers ask everything that is saved for its size."""
    ctx.absent = [index for index, tensor in enumerate(tensors) if tensor is None]
    ctx.save_for_backward(*[tensor for tensor in tensors if tensor is not None])


def restore(ctx: Any) -> list[Any]:
    """The arguments of `save`, in order, None included."""
    tensors = list(ctx.saved_tensors)
    for index in ctx.absent:
        tensors.insert(index, None)
    return tensors


def plain_gradient(dy: Tensor) -> Tensor:
    """dy as kernels read it: dense, in memory as it lies."""
    if dy.layout != torch.strided:
        dy = dy.to_dense()
    elif is_zero_tensor(dy):
        dy = dy.clone()
    return dy.resolve_neg()


def wants_torch(gradient: Tensor | None) -> bool:
    """Whether a backward has to be plain torch: it is differentiated itself, or batched by vmap."""
    if torch.is_grad_enabled() or is_transformed():
        return True
    return gradient is not None and is_batched(gradient)


def versions(tensors: Sequence[Tensor | None]) -> list[int | None]:
    """What tells whether tensors were changed in place, as torch tells it of those that it saves."""
    return [None if each is None or each.is_inference() else each._version for each in tensors]


def through(activation: Activation, saved: Tensor, dh: Tensor, keeps_z: bool) -> Tensor:
    """dz = dh a'(z), differentiable in dh and in what was saved: z, or the output."""
    if keeps_z:
        return torch.autograd.grad(activation(saved), saved, dh, create_graph=True)[0]
    assert activation.reference_backward is not None
    return activation.reference_backward(dh, saved, *activation.values)


def dropout_factors(
    seed: Tensor | None, dropout: Dropout | None, rows: int, width: int, dtype: torch.dtype
) -> Tensor | None:
    """What a layer's Dropout multiplied by, (rows, width), in float32 at least: made again; None where it has none."""
    if seed is None or dropout is None:
        return None
    ones = seed.new_ones((rows, width), dtype=torch.promote_types(dtype, torch.float32))
    pointwise(ones, ones, ACTIVATIONS["identity"], seed=seed, dropout=dropout)
    return ones


def dropped(h: Tensor, factors: Tensor | None) -> Tensor:
    """h as Dropout leaves it."""
    return h if factors is None else (h * factors).to(h.dtype)


def differentiable_backward(
    activations: Sequence[Activation],
    dtype: torch.dtype,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    versions_before: Sequence[int | None],
    dy: Tensor,
    needs_x: bool,
    needs: Sequence[bool],
    factors: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx, and the gradients of W_1 …, b_1 …, in plain torch: for when they are to be differentiated themselves.

    `factors` are what each layer's Dropout multiplied by, or None.

    Raises:
        RuntimeError: a parameter is no longer what the forward computed with.
    """
    layers = len(activations)
    factors = [None] * layers if factors is None else factors
    for index, (before, after) in enumerate(zip(versions_before, versions(parameters))):
        if before != after:
            raise RuntimeError(
                f"{'weight' if index < layers else 'bias'} {index % layers} was changed in place since the forward; "
                f"its gradient can only be differentiated before that; change it later, or a clone of it"
            )
    weights, biases = parameters[:layers], parameters[layers:]
    hs, saved = [x.to(dtype)], []
    dh: Tensor | None = dy
    gradients: list[Tensor | None] = [None] * len(parameters)
    with torch.enable_grad():
        for weight, bias, activation, left in zip(weights, biases, activations, factors):
            assert weight is not None
            z = F.linear(hs[-1], weight.to(dtype), None if bias is None else bias.to(dtype))
            h = activation(z)
            hs.append(dropped(h, left))
            saved.append(z if activation.keeps_preactivation else h)
        for index in reversed(range(layers)):
            weight, bias, activation = weights[index], biases[index], activations[index]
            assert weight is not None
            assert dh is not None
            dz = dropped(dh, factors[index])
            if activation.name != "identity":
                dz = through(activation, saved[index], dz, activation.keeps_preactivation)
            if needs[index]:
                gradients[index] = (dz.t() @ hs[index]).to(weight.dtype)
            if bias is not None and needs[layers + index]:
                gradients[layers + index] = dz.sum(0).to(bias.dtype)
            if not (needs_x or any(needs[:index]) or any(needs[layers : layers + index])):
                return None, gradients
            dh = dz @ weight.to(dtype)
    return None if dh is None else dh.to(x.dtype), gradients
