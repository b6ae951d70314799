"""linear_act and mlp: checks, allocation and differentiation around the kernels.

A narrow network is one autograd.Function: (x, W_1 …, b_1 …) -> y, one launch.

A wider one goes layer by layer. Layer l is one autograd.Function of its pre-activation's predecessor: (z_{l-1}, W_l,
b_l) -> z_l, where z_l = a_{l-1}(z_{l-1}) W_lᵀ + b_l. The edge between two of them carries dz, so that a layer's dgrad
ends in the derivative of the layer below. What travels on the edge is the one tensor that is kept: z itself, or, where
the derivative can be read off the output, h in its place, whose gradient by agreement is dz all the same. Users never
see such a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from . import reference
from .kernels import configs, layer_backward, layer_forward, network
from .kernels.activations import ACTIVATIONS, Activation, resolve
from .plan import (
    DEBUG,
    Backend,
    NetworkPlan,
    check_backend,
    check_recompute,
    compute_dtype,
    float32_precision,
    network_path,
    wants_gradients,
    why_reference,
)

try:
    from torch._C._dynamo.guards import TensorGuards as _TensorGuards

    TensorGuards: Any = _TensorGuards
except ImportError:  # it is no public name; without it, every call decides anew
    TensorGuards = None

__all__ = ["Layer", "linear_act", "mlp"]

IDENTITY = ACTIVATIONS["identity"]
HALVES = (torch.float16, torch.bfloat16)


class Layer(NamedTuple):
    """h = a(x Wᵀ + b): weight (N, K), bias (N,) or None."""

    weight: Tensor
    bias: Tensor | None
    activation: Activation


def linear_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | Activation | nn.Module | type[nn.Module] | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """h = a(x Wᵀ + b): a linear layer with its activation.

    Args:
        x: (..., K), any strides, rows included that are none.
        weight: (N, K).
        bias: (N,), or None.
        activation: a name of `ACTIVATIONS`, an `nn.Module` class or instance; None is the identity.
        backend: "auto", "triton" (an error where the kernels cannot run) or "reference" (plain torch).

    Returns:
        (..., N), of x's dtype (autocast's where it is on).

    Raises:
        TypeError: x, weight or bias is not a tensor, or `activation` is none of the above.
        ValueError: an unknown activation or backend.
        RuntimeError: shapes, dtypes or devices that do not fit together; backend="triton" where it cannot run.
    """
    return _mlp(x, (Layer(weight, bias, resolve(activation)),), backend)


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    activation: str | Activation | nn.Module | type[nn.Module] | None = "relu",
    output_activation: str | Activation | nn.Module | type[nn.Module] | None = None,
    *,
    backend: Backend = "auto",
    recompute: bool | None = None,
) -> Tensor:
    """H_l = a_l(H_{l-1} W_lᵀ + b_l), H_0 = x: a whole network; returns the last H.

    Args:
        x: (..., d_0).
        weights: of each layer, (d_l, d_{l-1}).
        biases: of each layer, (d_l,) or None; None for none at all.
        activation: after every layer but the last, as in `linear_act`.
        output_activation: after the last layer.
        backend: as in `linear_act`.
        recompute: what is kept for backward. True: x alone, hidden layers are computed again. False: one tensor of each
            layer. None: whatever is faster.

    Raises:
        As `linear_act`; and ValueError where there is no layer, or not one bias a layer; TypeError for another
        `recompute`.
    """
    if len(weights) == 0:
        raise ValueError("weights is empty; it needs one weight for each layer")
    biases = [None] * len(weights) if biases is None else biases
    if len(biases) != len(weights):
        raise ValueError(f"biases has {len(biases)} entries; it needs one for each of the {len(weights)} weights")
    hidden, last = resolve(activation), resolve(output_activation, "output_activation")
    activations = [hidden] * (len(weights) - 1) + [last]
    return _mlp(x, tuple(map(Layer, weights, biases, activations)), backend, recompute)


def _mlp(x: Tensor, layers: Sequence[Layer], backend: Backend, recompute: bool | None = None) -> Tensor:
    check_backend(backend)
    check_recompute(recompute)
    dtype = check_call(x, layers)
    if why_reference(x, layers, dtype, backend, recompute) is None:
        return run_kernels(x, layers, dtype, recompute)
    if recompute and can_checkpoint():
        return checkpoint(reference.mlp, x, *zip(*layers), use_reentrant=False)
    return reference.mlp(x, *zip(*layers))


def check_call(x: Tensor, layers: Sequence[Layer]) -> torch.dtype:
    """The dtype that the products are computed in: x's, or autocast's where it is on.

    Raises:
        TypeError: something is not a tensor.
        RuntimeError: shapes, dtypes or devices that do not fit together.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"input is {type(x).__name__}; it needs to be a torch.Tensor; convert it with torch.as_tensor")
    device = x.device
    dtype = compute_dtype(x.dtype, device.type)
    # Autocast brings floating-point dtypes together; it shows in the dtype, or in x being of autocast's already.
    mixed = dtype != x.dtype or (dtype in HALVES and torch.is_autocast_enabled(device.type))
    width = x.shape[-1] if x.dim() else None
    for index, (weight, bias, _) in enumerate(layers):
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
            if tensor.dtype != x.dtype and not (mixed and tensor.dtype.is_floating_point):
                raise RuntimeError(
                    f"input is {x.dtype}, the model's {name} {index} {tensor.dtype}; "
                    f"convert it with x.to({tensor.dtype}), or compute in a lower precision under torch.autocast"
                )
        if weight.dim() != 2:
            raise RuntimeError(f"weight {index} has shape {tuple(weight.shape)}; it needs to be (width out, width in)")
        if weight.shape[1] != width:
            found = (
                f"input has shape {tuple(x.shape)}; its last dimension needs to be {weight.shape[1]}"
                if index == 0
                else f"layer {index} takes {weight.shape[1]} features, layer {index - 1} gives {width}"
            )
            raise RuntimeError(f"{found}, the width of weight {index} {tuple(weight.shape)}")
        width = weight.shape[0]
        if bias is not None and bias.shape != (width,):
            raise RuntimeError(f"bias {index} has shape {tuple(bias.shape)}; it needs to be ({width},)")
    if not dtype.is_floating_point:
        raise RuntimeError(f"input is {dtype}; it needs to be a real floating-point dtype; convert it with x.float()")
    return dtype


def can_checkpoint() -> bool:
    """Whether there is something to keep, and torch.utils.checkpoint works: under torch.func transforms it does not."""
    return torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()


def run_kernels(x: Tensor, layers: Sequence[Layer], dtype: torch.dtype, recompute: bool | None = None) -> Tensor:
    """x (..., K) through kernels that compute in `dtype`, with gradients wherever they are wanted."""
    shape = x.shape
    if x.is_neg():  # a view that negates lazily; kernels read memory as it lies
        x = x.resolve_neg()
    if len(shape) != 2:
        x = x.reshape(-1, shape[-1])
    path = find_network(x, layers, dtype, recompute)
    if isinstance(path, NetworkPlan):
        weights, biases, _ = zip(*layers)
        y = run_network(x, weights, biases, path)
    elif recompute and can_checkpoint():
        y = checkpoint(run_layers, x, layers, dtype, use_reentrant=False)
    else:
        y = run_layers(x, layers, dtype)
    return y if len(shape) == 2 else y.view(*shape[:-1], y.shape[-1])


class Decision:
    """The network path that a call took; later calls that it holds for take it without deciding again.

    Whether it holds is asked of torch.compile's guards, which compare every tensor's type, dtype, device, sizes,
    strides, requires_grad and dispatch keys (inference mode, lazy negation …) in C++: a tenth of the time of deciding.
    """

    def __init__(
        self,
        x: Tensor,
        weights: tuple[Tensor, ...],
        biases: tuple[Tensor | None, ...],
        settings: tuple[object, ...],
        path: NetworkPlan,
    ) -> None:
        self.path = path
        self.settings = settings
        self.biased = [bias is not None for bias in biases]
        self.all_biased = all(self.biased)
        parameters = [*weights, *(bias for bias in biases if bias is not None)]
        self.guards = TensorGuards(
            x,
            *parameters,
            dynamic_dims_sizes=[[None, x.shape[1]], *(list(each.shape) for each in parameters)],
            dynamic_dims_strides=[[None, None], *(list(each.stride()) for each in parameters)],
        )

    @staticmethod
    def can_hold(x: Tensor, weights: tuple[Tensor, ...]) -> bool:
        """Whether such a call can be remembered: guards refuse a tensor that stands twice."""
        return TensorGuards is not None and not x.is_neg() and len(set(map(id, weights))) == len(weights)

    def holds(
        self, x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], settings: tuple[object, ...]
    ) -> bool:
        """Whether a call with these would decide the same."""
        if settings != self.settings:
            return False
        if not self.all_biased:
            if [bias is not None for bias in biases] != self.biased:
                return False
            biases = tuple(bias for bias in biases if bias is not None)
        return self.guards.check(x, *weights, *biases)  # not where a bias has become None


def settings(kind: str, backend: Backend, recompute: bool | None) -> tuple[object, ...]:
    """All that a path is decided by besides what `Decision` compares of tensors."""
    return (
        backend,
        recompute,
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.is_grad_enabled(),
        float32_precision(),
        torch._C._are_functorch_transforms_active(),
        forward_ad._current_level,
        torch._C._get_tracing_state(),
    )


def find_network(
    x: Tensor, layers: Sequence[Layer], dtype: torch.dtype, recompute: bool | None = None
) -> NetworkPlan | str:
    """The network path for these layers, or the reason why they take the layer path."""
    training = wants_gradients(x, layers)
    strides = tuple((*weight.stride(), 0 if bias is None else bias.stride(0)) for weight, bias, _ in layers)
    widths = (x.shape[1], *(weight.shape[0] for weight, _, _ in layers))
    activations = tuple(activation for _, _, activation in layers)
    precision = float32_precision() if dtype == torch.float32 else "ieee"
    wide = x.dtype.itemsize if x.dtype.itemsize > dtype.itemsize else 0
    device = configs.device_of(x)
    return network_path(widths, strides, activations, dtype, precision, device, training, recompute, wide)


def run_network(x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], path: NetworkPlan) -> Tensor:
    """The network path: x (M, d_0) -> y (M, d_L)."""
    if path.formulation is None:
        return _network_forward(x, weights, biases, path)
    return _NetworkFunction.call(x, path, *weights, *biases)


def _network_forward(
    x: Tensor, weights: tuple[Any, ...], biases: tuple[Any, ...], path: NetworkPlan, keep: bool = False
) -> Any:
    """y; with `keep`, (y, what is kept of the hidden layers, the last pre-activation where that one is needed)."""
    net, rows = path.network, x.shape[0]
    y = x.new_empty((rows, net.widths[-1]), dtype=net.dtype)
    kept = z = None
    if keep and net.layers > 1:
        kept = x.new_empty((rows * net.starts[-1],), dtype=net.dtype)
    if keep and net.keeps_z[-1]:
        z = torch.empty_like(y)
    if rows:
        network.forward(x, weights, biases, y, net, path.forward, kept=kept, z=z)
    return (y, kept, z) if keep else y


class _NetworkFunction(torch.autograd.Function):
    """(x, W_1 …, b_1 …) -> y: a whole network."""

    @classmethod
    def call(cls, *arguments: Any) -> Any:
        """`apply` without its search for tensors of torch.func transforms, which never come here: 2 µs less."""
        return super(torch.autograd.Function, cls).apply(*arguments)  # type: ignore[misc]

    @staticmethod
    def forward(ctx: Any, x: Tensor, path: NetworkPlan, *parameters: Tensor | None) -> Tensor:
        ctx.path = path
        layers = len(parameters) // 2
        # As the user has them, for a gradient that is differentiated; saved below is what the kernels read.
        ctx.parameters = parameters
        if path.formulation == "stored":
            y, kept, z = _network_forward(x, parameters[:layers], parameters[layers:], path, keep=True)
            own = None
            if path.network.activates_output:
                own = y if z is None else z
            first = parameters[0] if ctx.needs_input_grad[0] else None
            ctx.save_for_backward(x, kept, own, first, *parameters[1:layers])
        else:
            y = _network_forward(x, parameters[:layers], parameters[layers:], path)
            ctx.save_for_backward(x, None, None, *parameters)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, _, *needs = ctx.needs_input_grad
        x, kept, own, *saved = ctx.saved_tensors
        dy = _plain_gradient(dy)
        if _wants_torch(dy):
            with torch.enable_grad():
                dx, gradients = _differentiable_network_backward(
                    ctx.path.network, x, ctx.parameters, dy, needs_x, needs
                )
        else:
            parameters = [of_user if each is None else each for each, of_user in zip_longest(saved, ctx.parameters)]
            dx, gradients = _network_backward(ctx.path, x, kept, own, parameters, dy, needs_x, needs)
        return dx, None, *gradients


def _plain_gradient(dy: Tensor) -> Tensor:
    """dy as kernels read it: dense, in memory as it lies."""
    if dy.layout != torch.strided:
        dy = dy.to_dense()
    elif dy._is_zerotensor():
        dy = dy.clone()
    return dy.resolve_neg()


def _wants_torch(gradient: Tensor | None) -> bool:
    """Whether a backward has to be plain torch: it is differentiated itself, or batched by vmap."""
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return True
    functorch = torch._C._functorch
    return gradient is not None and (
        functorch.is_batchedtensor(gradient) or functorch.is_legacy_batchedtensor(gradient)
    )


def _network_backward(
    path: NetworkPlan,
    x: Tensor,
    kept: Tensor | None,
    own: Tensor | None,
    parameters: Sequence[Tensor | None],
    dy: Tensor,
    needs_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx, and the gradients of W_1 …, b_1 …, through the kernels, only those that are wanted."""
    net = path.network
    rows, layers = x.shape[0], net.layers
    weights: tuple[Any, ...] = tuple(parameters[:layers])
    biases = tuple(parameters[layers:])
    assert path.backward is not None
    # Hooks on saved tensors may have given a parameter other strides, which the kernels are compiled for.
    strides = tuple((*w.stride(), 0 if b is None else b.stride(0)) for w, b in zip(weights, biases))
    if strides != net.strides:
        net = network.network_of(net.widths, strides, net.activations, net.dtype, net.precision)
    wanted = network.gradients_of(net.widths, tuple(needs[:layers]), tuple(needs[layers:]), needs_x)
    make = torch.empty if rows else torch.zeros

    def like(parameter: Tensor | None) -> Tensor:
        assert parameter is not None
        return make(parameter.shape, dtype=parameter.dtype, device=x.device)

    dx = make(x.shape, dtype=x.dtype, device=x.device) if needs_x else None
    gradients = [like(parameter) if need else None for parameter, need in zip(parameters, needs)]
    if rows == 0:
        return dx, gradients
    by_layer = (gradient for pair in zip(gradients[:layers], gradients[layers:]) for gradient in pair)
    sums = [gradient for gradient in by_layer if gradient is not None]
    if path.formulation == "recompute":
        network.recompute(x, dy, weights, biases, dx, sums, net, wanted, path.backward)
        return dx, gradients
    if path.formulation == "replay":
        y, kept, z = _network_forward(x, weights, biases, replace(path, network=net), keep=True)
        own = None if not net.activates_output else y if z is None else z
    dz = None if kept is None else torch.empty_like(kept)
    last = None if own is None else torch.empty_like(own)
    if last is not None or wanted.lowest + 1 < layers or needs_x:
        network.dgrad(dy, weights, kept, own, dz, last, dx, net, wanted, path.backward)
    if sums:
        network.wgrad(x, dy if last is None else last, kept, dz, sums, net, wanted, path.wgrad)
    return dx, gradients


def _differentiable_network_backward(
    net: network.Network,
    x: Tensor,
    parameters: Sequence[Tensor | None],
    dy: Tensor,
    needs_x: bool,
    needs: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The same gradients in plain torch, for when they are to be differentiated themselves."""
    layers = net.layers
    weights, biases = parameters[:layers], parameters[layers:]
    hs, saved = [x.to(net.dtype)], []
    for weight, bias, activation in zip(weights, biases, net.activations):
        assert weight is not None
        z = F.linear(hs[-1], weight.to(net.dtype), None if bias is None else bias.to(net.dtype))
        hs.append(activation(z))
        saved.append(z if activation.keeps_preactivation else hs[-1])
    dh: Tensor | None = dy
    gradients: list[Tensor | None] = [None] * len(parameters)
    for index in reversed(range(layers)):
        weight, bias, activation = weights[index], biases[index], net.activations[index]
        assert weight is not None
        assert dh is not None
        dz = dh if activation is IDENTITY else _through(activation, saved[index], dh)
        if needs[index]:
            gradients[index] = (dz.t() @ hs[index]).to(weight.dtype)
        if bias is not None and needs[layers + index]:
            gradients[layers + index] = dz.sum(0).to(bias.dtype)
        if not (needs_x or any(needs[:index]) or any(needs[layers : layers + index])):
            return None, gradients
        dh = dz @ weight.to(net.dtype)
    return None if dh is None else dh.to(x.dtype), gradients


def run_layers(x: Tensor, layers: Sequence[Layer], dtype: torch.dtype) -> Tensor:
    """The layer path: x (M, K) through kernels that compute in `dtype`."""
    h = x if x.dtype == dtype else x.to(dtype)
    precision = float32_precision() if dtype == torch.float32 else "ieee"
    differentiable = torch.is_grad_enabled()
    needs_grad = differentiable and h.requires_grad
    edge, below, last = h, IDENTITY, len(layers) - 1
    for index, (weight, bias, activation) in enumerate(layers):
        static = _Static(index, below, activation, index == last, precision)
        needs_grad = needs_grad or (
            differentiable and (weight.requires_grad or (bias is not None and bias.requires_grad))
        )
        if needs_grad:
            outputs = _LayerFunction.apply(edge, h, weight, bias, static)
            h, edge = outputs if type(outputs) is tuple else (outputs, outputs)
        else:
            h, _ = _forward(h, _cast(weight, dtype), bias, static, keep=False)
            edge = h
        below = activation
    return h


class _Static(NamedTuple):
    """What a layer's kernels need to know besides tensors."""

    layer: int
    below: Activation  # the layer below's activation; the identity for the first layer
    activation: Activation
    last: bool
    precision: str


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight if weight.dtype == dtype else weight.to(dtype)


def _forward(
    h_below: Tensor, weight: Tensor, bias: Tensor | None, static: _Static, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """h, and z where it is to be kept."""
    h = torch.empty((h_below.shape[0], weight.shape[0]), dtype=h_below.dtype, device=h_below.device)
    z = torch.empty_like(h) if keep and static.activation.keeps_preactivation else None
    layer_forward.layer_forward(h_below, weight, bias, h, z, static.activation, static.precision)
    if DEBUG:
        _check_finite(static, "forward", h=h)
    return h, z


class _LayerFunction(torch.autograd.Function):
    """(z_below, W, b) -> z, with h = a(z) beside it; see the top of this module.

    The last layer of a run returns h to its user, whose gradient is dh; an inner one's edge brings dz.
    """

    @staticmethod
    def forward(
        ctx: Any, edge: Tensor, h_below: Tensor, weight: Tensor, bias: Tensor | None, static: _Static
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        needs_edge, _, needs_weight, _, _ = ctx.needs_input_grad
        compute_weight = _cast(weight, h_below.dtype)
        h, z = _forward(h_below, compute_weight, bias, static, keep=True)
        # One tensor serves dW and the derivative below. Where nothing below needs a gradient, the edge is h_below.
        kept = edge if needs_weight or (needs_edge and static.below is not IDENTITY) else None
        own = None
        if static.last and static.activation is not IDENTITY:
            own = h if z is None else z
        ctx.save_for_backward(kept, compute_weight if needs_edge else None, own)
        ctx.static = static
        ctx.width_in = weight.shape[1]
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        # The weight as the user has it, for a gradient that is differentiated; saved above where it needs no cast.
        ctx.master = weight if compute_weight is not weight else None
        if z is None:
            return h
        if not static.last:
            ctx.mark_non_differentiable(h)
        return h, z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        static = ctx.static
        dh, dz = (grads[0], grads[1] if len(grads) == 2 else None) if static.last else (None, grads[-1])
        if static.activation is IDENTITY:
            dh, dz = None, dz if dh is None else dh
        if dh is None and dz is None:
            return None, None, None, None, None
        dh, dz = (None if each is None else _plain_gradient(each) for each in (dh, dz))
        if _wants_torch(dz if dh is None else dh):
            with torch.enable_grad():
                d_edge, dw, db = _differentiable_backward(ctx, dh, dz)
        else:
            d_edge, dw, db = _backward(ctx, dh, dz)
        return d_edge, None, dw, db, None


def _backward(ctx: Any, dh: Tensor | None, dz: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of (edge, W, b) through the kernels, only those that are wanted."""
    static: _Static = ctx.static
    kept, weight, own = ctx.saved_tensors
    needs_edge, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
    if dh is not None:
        through = torch.empty_like(own)
        layer_backward.output_gradient(dh, own, through, static.activation)
        dz = through if dz is None else through + dz
    assert dz is not None
    rows, width_out = dz.shape
    d_edge = dw = db = None
    h_below = kept
    if needs_edge:
        d_edge = torch.empty((rows, ctx.width_in), dtype=dz.dtype, device=dz.device)
        saved = kept if static.below is not IDENTITY else None
        rebuilt = None
        if needs_weight and static.below.keeps_preactivation:
            rebuilt = h_below = torch.empty_like(d_edge)
        layer_backward.dgrad(dz, weight, saved, d_edge, rebuilt, static.below, static.precision)
    if needs_weight:
        dw = torch.empty((width_out, ctx.width_in), dtype=ctx.weight_dtype, device=dz.device)
    if needs_bias:
        db = torch.empty((width_out,), dtype=ctx.bias_dtype, device=dz.device)
    if needs_weight or needs_bias:
        layer_backward.wgrad(dz, h_below if needs_weight else None, dw, db, static.precision)
    if DEBUG:
        _check_finite(static, "backward", dz=d_edge, dW=dw, db=db)
    return d_edge, dw, db


def _differentiable_backward(ctx: Any, dh: Tensor | None, dz: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same gradients in plain torch, for when they are to be differentiated themselves."""
    static: _Static = ctx.static
    kept, weight, own = ctx.saved_tensors
    needs_edge, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
    if ctx.master is not None and weight is not None:
        weight = ctx.master.to(weight.dtype)
    if dh is not None:
        through = _through(static.activation, own, dh)
        dz = through if dz is None else through + dz
    assert dz is not None
    d_edge = dw = db = None
    h_below = kept
    if needs_edge and static.below is not IDENTITY:
        # kept stands on the edge, for z: its own, or as the output that z gave.
        keeps_preactivation = static.below.keeps_preactivation
        h_below = static.below(kept) if keeps_preactivation else _OutputOf.apply(kept, static.below)
    if needs_edge:
        d_edge = dz @ weight
        if static.below is not IDENTITY:
            (d_edge,) = torch.autograd.grad(h_below, kept, d_edge, create_graph=True)
    if needs_weight:
        dw = (dz.t() @ h_below).to(ctx.weight_dtype)
    if needs_bias:
        db = dz.sum(0).to(ctx.bias_dtype)
    return d_edge, dw, db


def _through(activation: Activation, saved: Tensor, dh: Tensor) -> Tensor:
    """dz = dh a'(z), differentiable in dh and in what was saved."""
    if activation.keeps_preactivation:
        return torch.autograd.grad(activation(saved), saved, dh, create_graph=True)[0]
    assert activation.reference_backward is not None
    return activation.reference_backward(dh, saved, *activation.values)


class _OutputOf(torch.autograd.Function):
    """h as a function of z, evaluated at an edge on which h stands for z: h -> h, with derivative a'(z) read off h."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, activation: Activation) -> Tensor:
        output = h.clone()
        ctx.save_for_backward(output)
        ctx.activation = activation
        return output

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, None]:
        (h,) = ctx.saved_tensors
        return ctx.activation.reference_backward(dh, h, *ctx.activation.values), None


def _check_finite(static: _Static, direction: str, **tensors: Tensor | None) -> None:
    """Wait for the kernels of a layer, and name the layer if one of its results is not finite.

    Raises:
        FloatingPointError: a NaN or an infinity.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
        bad = int(tensor.numel() - tensor.isfinite().sum())
        if bad:
            raise FloatingPointError(
                f"layer {static.layer} ({static.activation}), {direction}: {bad} of {tensor.numel()} elements of "
                f"{name} are NaN or infinite"
            )
