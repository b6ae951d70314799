"""linear_act and mlp, the functional forms, and the checks of their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import reference
from .dtypes import dtype_name
from .engine.calls import can_checkpoint, checkpointed, run_kernels
from .engine.originals import LINEAR, why_mode, why_replaced
from .engine.paths import why_reference
from .engine.recognize import resolve
from .engine.settings import (
    Backend,
    check_backend,
    check_recompute,
    compute_dtype,
)
from .errors import count
from .kernels.activation import Activation
from .reference import Layer

__all__ = ["linear_act", "mlp"]

HALVES = (torch.float16, torch.bfloat16)


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | Activation | nn.Module | type[nn.Module] | Callable[..., Tensor] | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """h = a(x Wᵀ + b): a linear layer with its activation.

    Args:
        x: (..., K), any strides; there may be no rows.
        weight: (N, K).
        bias: (N,), or None.
        activation: a name of `ACTIVATIONS`, an `nn.Module` class or instance, a function such as `torch.relu`; None is
            the identity.
        backend: "auto", "triton" (an error if the kernels cannot run) or "reference" (plain torch).

    Returns:
        h, (..., N), in x's dtype, or autocast's if it is on.

    Raises:
        TypeError: x, weight or bias is not a tensor, or `activation` is none of the above.
        ValueError: an unknown activation or backend.
        RuntimeError: shapes, dtypes or devices do not fit together, or the kernels cannot run with backend="triton".
    """
    return _mlp(x, (Layer(weight, bias, resolve(activation)),), backend)


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    activation: str | Activation | nn.Module | type[nn.Module] | Callable[..., Tensor] | None = "relu",
    output_activation: str | Activation | nn.Module | type[nn.Module] | Callable[..., Tensor] | None = None,
    *,
    backend: Backend = "auto",
    recompute: bool | None = None,
) -> Tensor:
    """H_l = a_l(H_{l-1} W_lᵀ + b_l), H_0 = x: a whole network.

    Args:
        x: (..., d_0).
        weights: (d_l, d_{l-1}) for each layer.
        biases: (d_l,) or None for each layer; None if no layer has a bias.
        activation: the activation after every layer but the last, as in `linear_act`.
        output_activation: the activation after the last layer.
        backend: as in `linear_act`.
        recompute: True: save only x for backward, and compute the hidden layers again. False: save one tensor for each
            layer. None: the faster one.

    Returns:
        The last H, (..., d_L), in x's dtype, or autocast's if it is on.

    Raises:
        TypeError: x, a weight or a bias is not a tensor, an `activation` is of another type, or `recompute` is neither
            True, False nor None.
        ValueError: there is no layer, the number of biases is not that of the weights, or an activation or the backend
            is unknown.
        RuntimeError: shapes, dtypes or devices do not fit together, or the kernels cannot run with backend="triton".
    """
    if len(weights) == 0:
        raise ValueError("weights is empty; it needs one weight for each layer")
    biases = [None] * len(weights) if biases is None else biases
    if len(biases) != len(weights):
        raise ValueError(f"biases has {len(biases)} entries; it needs one for {count(len(weights), 'weight')}")
    hidden, last = resolve(activation), resolve(output_activation, "output_activation")
    activations = [hidden] * (len(weights) - 1) + [last]
    return _mlp(x, tuple(map(Layer, weights, biases, activations)), backend, recompute)


def _mlp(x: Tensor, layers: Sequence[Layer], backend: Backend, recompute: bool | None = None) -> Tensor:
    check_backend(backend)
    check_recompute(recompute)
    dtype = check_call(x, layers)
    if why_reference(x, layers, dtype, backend, recompute, _why_changed(layers)) is None:
        return run_kernels(x, layers, dtype, recompute, backend)
    weights, biases, activations, _ = zip(*layers)
    if recompute and can_checkpoint(x):
        return checkpointed(reference.mlp, x, weights, biases, activations)
    return reference.mlp(x, weights, biases, activations)


def _why_changed(layers: Sequence[Layer]) -> str | None:
    """The reason why a function that these layers call is not torch's own; None where all are."""
    reason = why_mode()
    for layer in layers:
        reason = reason or why_replaced((LINEAR,), layer.activation.name)
    return reason


def check_call(x: Tensor, layers: Sequence[Layer]) -> torch.dtype:
    """Check the tensors of a call. Returns the dtype of the products: x's, or autocast's if that is on.

    Raises:
        TypeError: something is not a tensor.
        RuntimeError: shapes, dtypes or devices that do not fit together.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"input is {type(x).__name__}; it needs to be a torch.Tensor; "
            f"convert it with {_how_to_make_a_tensor(x, layers[0].weight)}"
        )
    device = x.device
    dtype = compute_dtype(x.dtype, device.type)
    if x.is_nested:  # plain torch runs and checks it; a strided nested tensor has no shape to check here
        return dtype
    # Autocast allows different floating-point dtypes. If x has autocast's dtype already, ask torch if autocast is on.
    mixed = dtype != x.dtype or (dtype in HALVES and torch.is_autocast_enabled(device.type))
    width = x.shape[-1] if x.dim() else None
    for index, (weight, bias, *_) in enumerate(layers):
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is None and name == "bias":
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} {index} is {type(tensor).__name__}; it needs to be a torch.Tensor")
            if tensor.device != device:
                raise RuntimeError(
                    f"input is on {device}, the model's parameters on {tensor.device}; "
                    f"move it with x.to({str(tensor.device)!r})"
                    if index == 0
                    else f"{name} {index} is on {tensor.device}, the input on {device}; "
                    f"move the whole model with model.to({str(device)!r})"
                )
            if tensor.dtype != x.dtype and not (mixed and _autocast_casts(tensor.dtype)):
                raise RuntimeError(
                    f"input is {x.dtype}, the model's {name} {index} {tensor.dtype}; {_how_to_convert(x, tensor)}"
                )
        if weight.dim() != 2:
            raise RuntimeError(f"weight {index} has shape {tuple(weight.shape)}; it needs to be (width out, width in)")
        if weight.shape[1] != width:
            problem = (
                f"input has shape {tuple(x.shape)}; its last dimension needs to be {weight.shape[1]}"
                if index == 0
                else f"layer {index} takes {weight.shape[1]} features, layer {index - 1} gives {width}"
            )
            # For example images (N, C, H, W) that were not flattened.
            flat = index == 0 and x.dim() > 2 and x.shape[1:].numel() == weight.shape[1]
            fix = "; flatten each row with x.flatten(1)" if flat else ""
            raise RuntimeError(f"{problem}, the width of weight {index} {tuple(weight.shape)}{fix}")
        width = weight.shape[0]
        if bias is not None and bias.shape != (width,):
            raise RuntimeError(f"bias {index} has shape {tuple(bias.shape)}; it needs to be ({width},)")
    if not dtype.is_floating_point:
        raise RuntimeError(f"input is {dtype}; it needs to be a real floating-point dtype; convert it with x.float()")
    return dtype


def _autocast_casts(dtype: torch.dtype) -> bool:
    """True if autocast casts tensors of that dtype."""
    return dtype.is_floating_point and dtype != torch.float64


def _how_to_make_a_tensor(x: Any, weight: object) -> str:
    """Code, for an error message, that converts an argument that is no tensor to a tensor of the weight's dtype."""
    to_numpy = callable(getattr(x, "to_numpy", None))  # a DataFrame's
    if not isinstance(x, np.ndarray) and not to_numpy:
        return "torch.as_tensor"
    array = x.to_numpy() if to_numpy else x
    code = "x.to_numpy()" if to_numpy else "x"
    if array.dtype == object:
        code, array = f"{code}.astype(float)", np.empty(0)
    dtype = weight.dtype if isinstance(weight, Tensor) else torch.float32
    if str(array.dtype) == dtype_name(dtype):
        return f"torch.from_numpy({code})"
    return f"torch.from_numpy({code}).{'float()' if dtype == torch.float32 else f'to({dtype})'}"


def _how_to_convert(x: Tensor, parameter: Tensor) -> str:
    """Advice, for an error message, on an input whose dtype is not the parameter's."""
    if x.is_complex() and not parameter.is_complex():
        return "take x.real, x.abs() or torch.view_as_real(x), which are real"
    convert = f"convert it with x.to({parameter.dtype})"
    helps = _autocast_casts(x.dtype) and _autocast_casts(parameter.dtype)
    is_on = compute_dtype(torch.float32, x.device.type) != torch.float32  # autocast is on and did not help
    return f"{convert}, or compute in a lower precision under torch.autocast" if helps and not is_on else convert
