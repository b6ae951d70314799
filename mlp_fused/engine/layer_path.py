"""The layer path: every layer is one autograd.Function of its pre-activation's predecessor, (z_{l-1}, W_l, b_l) -> z_l.

z_l = a_{l-1}(z_{l-1}) W_lᵀ + b_l. The edge between two of them carries dz, so that a layer's dgrad ends in the
derivative of the layer below. What travels on the edge is the one tensor that is kept: z itself, or, where the
derivative can be read off the output, h in its place, whose gradient by agreement is dz all the same. Users never see
such a tensor. Where Dropout follows an activation, h is what it left, and the mask is made anew from a seed that all
layers of a call share.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels import devices, layer_tiles
from ..kernels.activation import Activation
from ..kernels.activations import IDENTITY
from ..kernels.dropout import Dropout, keeps_preactivation
from ..kernels.launch import Launches, Remembered, describable
from ..kernels.layer_backward import dgrad, output_gradient, wgrad
from ..kernels.layer_forward import layer_forward
from ..kernels.tile_config import Problem
from . import tables
from .autograd import (
    PlainFunction,
    dropout_factors,
    dropped,
    plain_gradient,
    restore,
    save,
    through,
    wants_torch,
)
from .settings import DEBUG, profiler_enabled
from .torch_products import dgrad_by_torch, forward_by_torch, wgrad_by_torch

__all__ = ["IDENTITY", "LayerPath", "layer_after_layer", "layer_path"]


Made = Callable[..., bool]  # a launch, or a product of torch's, for tensors like those that it was made of


def _ranged(launch: Callable[..., Made | None]) -> Callable[..., Made | None]:
    """A profiler shows what a layer launches under a range of the layer's name."""
    kind = launch.__name__.removesuffix("_into")
    if DEBUG:
        launch = _checked(launch, kind)

    @functools.wraps(launch)
    def in_range(self: LayerKernels, *tensors: Tensor | None) -> Made | None:
        if not profiler_enabled():
            return launch(self, *tensors)
        with torch.profiler.record_function(f"layer {self.layer} ({self.activation}): {kind}"):
            return launch(self, *tensors)

    return in_range


# What the kernels write that is looked at under MLP_FUSED_DEBUG, by the names of their arguments.
RESULTS = {"forward": ("h",), "output_gradient": ("dz",), "dgrad": ("dx",), "wgrad": ("dw", "db")}


def _checked(launch: Callable[..., Made | None], kind: str) -> Callable[..., Made | None]:
    """The launch, waited for, and the layer named where it failed or one of its results is not finite.

    Raises:
        FloatingPointError: a NaN or an infinity.
    """
    places = {name: place for place, name in enumerate(inspect.signature(launch).parameters) if name in RESULTS[kind]}

    @functools.wraps(launch)
    def checked(self: LayerKernels, *tensors: Tensor | None) -> Made | None:
        where = f"layer {self.layer} ({self.activation}), {kind}"
        _wait(tensors[0])  # an error of what was launched before is not this layer's
        try:
            made = launch(self, *tensors)
            _wait(tensors[0])
        except RuntimeError as error:
            error.args = (f"{where}: {error}",)
            raise
        for name, place in places.items():
            tensor = tensors[place - 1] if place <= len(tensors) else None  # self is no tensor
            if tensor is not None and (bad := int(tensor.numel() - tensor.isfinite().sum())):
                raise FloatingPointError(f"{where}: {bad} of {tensor.numel()} elements of {name} are NaN or infinite")
        return made

    return checked


def _wait(tensor: Tensor | None) -> None:
    """For what was launched on a tensor's device; its errors are raised here."""
    if tensor is not None and tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


class LayerKernels:
    """The kernels of one layer, and the launches that were made of them, by shapes and strides.

    Attributes:
        layer: which one, from 0.
        below: the layer below's activation; the identity for the first layer.
        activation: its own.
        last: whether its output goes to the user.
        dtype: what it computes in.
        precision: torch's setting for fp32.
        width_in, width_out: how wide.
        weight_dtype, bias_dtype: the parameters', which their gradients have; None without a bias.
        torch_too: whether a product is left to torch where that was faster as measured.
        dropout: of its output; None where nothing is dropped.
        dropout_below: of the layer below's.
        keeps_z: whether the pre-activation is kept for backward; below_keeps_z: the layer below's.
    """

    def __init__(
        self,
        layer: int,
        below: Activation,
        activation: Activation,
        last: bool,
        dtype: torch.dtype,
        precision: str,
        width_in: int,
        width_out: int,
        weight_dtype: torch.dtype,
        bias_dtype: torch.dtype | None,
        torch_too: bool,
        dropout: Dropout | None,
        dropout_below: Dropout | None,
    ) -> None:
        self.layer = layer
        self.below = below
        self.activation = activation
        self.last = last
        self.dtype = dtype
        self.precision = precision
        self.width_in = width_in
        self.width_out = width_out
        self.weight_dtype = weight_dtype
        self.bias_dtype = bias_dtype
        self.torch_too = torch_too
        self.dropout = dropout
        self.dropout_below = dropout_below
        self.has_below = below is not IDENTITY
        self.keeps_z = keeps_preactivation(activation, dropout)
        self.below_keeps_z = keeps_preactivation(below, dropout_below)
        self.launches = Launches()

    def forward(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool, seed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """h, and z where it is to be kept. A seed is of all layers; those that drop nothing leave it aside."""
        h = x.new_empty((x.shape[0], self.width_out))
        z = torch.empty_like(h) if keep and self.keeps_z else None
        if self.dropout is None:
            self.forward_into(x, weight, bias, h, z)
        else:
            self.forward_into(x, weight, bias, h, z, seed)
        return h, z

    @_ranged
    def forward_into(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, z: Tensor | None, *seed: Tensor | None
    ) -> Made | None:
        """h, and z where there is memory for it. All that end in "_into" return what does the same again.

        Those that drop are given the seed after all other tensors.
        """
        bias_stride = None if bias is None else bias.stride()
        key = ("forward", x.shape, x.stride(), weight.stride(), bias_stride, z is None, x.get_device())
        made = self.launches.again(key, x, weight, bias, h, z, *seed)
        if made is None:
            (m, k), n = x.shape, weight.shape[0]
            aligned, activation = describable(x, weight, h, z), self.activation.name
            problem = Problem("forward", m, n, k, self.dtype, self.precision, aligned, activation)
            tensors = (x, weight, bias, h, z)
            made = self._make(
                problem, layer_forward, forward_by_torch, *tensors, self.activation, **_dropping(seed, self.dropout)
            )
            self.launches.remember(key, made)
        return made

    def output_gradient(self, dh: Tensor, own: Tensor | None, seed: Tensor | None) -> Tensor:
        """dz = dh ⊙ a'(own)."""
        dz = dh.new_empty(dh.shape)
        if self.dropout is None:
            self.output_gradient_into(dh, own, dz, None)
        else:
            self.output_gradient_into(dh, own, dz, None, seed)
        return dz

    @_ranged
    def output_gradient_into(
        self, dh: Tensor, own: Tensor | None, dz: Tensor, h: Tensor | None, *seed: Tensor | None
    ) -> Made | None:
        own_stride = None if own is None else own.stride()
        key = ("output_gradient", dh.shape, dh.stride(), own_stride, h is None, dh.get_device())
        made = self.launches.again(key, dh, own, dz, h, *seed)
        if made is None:
            made = output_gradient(dh, own, dz, self.activation, h=h, **_dropping(seed, self.dropout))
            self.launches.remember(key, made)
        return made

    def dgrad(
        self, dz: Tensor, weight: Tensor, saved: Tensor | None, rebuild: bool, seed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient of what is below, and with `rebuild` the layer below's output."""
        dx = dz.new_empty((dz.shape[0], self.width_in))
        h = torch.empty_like(dx) if rebuild else None
        if self.dropout_below is None:
            self.dgrad_into(dz, weight, saved, dx, h)
        else:
            self.dgrad_into(dz, weight, saved, dx, h, seed)
        return dx, h

    @_ranged
    def dgrad_into(
        self, dz: Tensor, weight: Tensor, saved: Tensor | None, dx: Tensor, h: Tensor | None, *seed: Tensor | None
    ) -> Made | None:
        saved_stride = None if saved is None else saved.stride()
        key = ("dgrad", dz.shape, dz.stride(), weight.stride(), saved_stride, h is None, dz.get_device())
        made = self.launches.again(key, dz, weight, saved, dx, h, *seed)
        if made is None:
            (m, n), k = dz.shape, weight.shape[1]
            aligned, activation = describable(dz, weight, saved, dx, h), self.below.name
            problem = Problem("dgrad", m, k, n, self.dtype, self.precision, aligned, activation)
            tensors = (dz, weight, saved, dx, h)
            made = self._make(
                problem, dgrad, dgrad_by_torch, *tensors, self.below, **_dropping(seed, self.dropout_below)
            )
            self.launches.remember(key, made)
        return made

    def wgrad(
        self, dz: Tensor, h: Tensor | None, needs_weight: bool, needs_bias: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """dW and db, those that are needed."""
        dw = dz.new_empty((self.width_out, self.width_in), dtype=self.weight_dtype) if needs_weight else None
        db = dz.new_empty((self.width_out,), dtype=self.bias_dtype) if needs_bias else None
        self.wgrad_into(dz, None if dw is None else h, dw, db)
        return dw, db

    @_ranged
    def wgrad_into(self, dz: Tensor, h: Tensor | None, dw: Tensor | None, db: Tensor | None) -> Made | None:
        key = ("wgrad", dz.shape, dz.stride(), None if h is None else h.stride(), db is None, dz.get_device())
        made = self.launches.again(key, dz, h, dw, db)
        if made is None:
            m, n, k = self.width_out, 1 if dw is None else self.width_in, dz.shape[0]
            problem = Problem("wgrad", m, n, k, self.dtype, self.precision, describable(dz, h))
            made = self._make(problem, wgrad, wgrad_by_torch, dz, h, dw, db)
            self.launches.remember(key, made)
        return made

    def _make(
        self,
        problem: Problem,
        by_kernel: Callable[..., Any],
        by_torch: Callable[..., Any],
        *arguments: Any,
        **dropping: Any,
    ) -> Made | None:
        """One product the first time, by a kernel or by torch; and what does it again."""
        device = devices.device_of(arguments[0])
        tile = tables.tile_for(problem, device)
        if tile is None and self.torch_too:
            pointwise = by_torch(*arguments, **dropping)
            rest = [each for each in arguments if isinstance(each, Activation)]
            if rest:
                rest.append(pointwise)

            def again(*tensors: Tensor | None) -> bool:
                by_torch(*tensors, *rest)
                return True

            def again_with_seed(*tensors: Tensor | None) -> bool:
                by_torch(*tensors[:-1], *rest, seed=tensors[-1], dropout=dropping["dropout"])
                return True

            return again_with_seed if dropping else again
        return by_kernel(*arguments, self.precision, tile or layer_tiles.choose(problem, device), **dropping)


def _dropping(seed: tuple[Tensor | None, ...], dropout: Dropout | None) -> dict[str, Any]:
    """What a launcher is told besides, where a seed is given."""
    return {"seed": seed[0], "dropout": dropout} if seed else {}


@dataclass(frozen=True, eq=False)
class LayerPath:
    """The layer path for some layers: their kernels, and the dtype they compute in."""

    layers: tuple[LayerKernels, ...]
    dtype: torch.dtype
    activations: tuple[Activation, ...]
    multiply_adds: int  # of a row
    casts: bool  # whether a weight is of another dtype
    keeps_output: bool  # whether the last activation's derivative is read off its output
    drops: bool  # whether any layer drops
    chains: Remembered = field(default_factory=Remembered)  # launches of all layers, by shapes and strides


@functools.lru_cache(maxsize=1024)
def layer_path(
    widths: tuple[int, ...],
    activations: tuple[Activation, ...],
    parameters: tuple[tuple[torch.dtype, torch.dtype | None], ...],
    dtype: torch.dtype,
    precision: str,
    torch_too: bool,
    dropouts: tuple[float, ...],
) -> LayerPath:
    """The one path for such layers. `parameters` are the dtypes of each one's weight, and bias or None; `dropouts` the
    probabilities of each one's Dropout, 0 where it has none.
    """
    last = len(activations) - 1
    drops = [Dropout(1.0 - p, index) if p else None for index, p in enumerate(dropouts)]
    layers = [
        LayerKernels(index, *activates, index == last, dtype, precision, *sides, *dtypes, torch_too, *dropping)
        for index, (activates, sides, dtypes, dropping) in enumerate(
            zip(
                zip((IDENTITY, *activations), activations),
                itertools.pairwise(widths),
                parameters,
                zip(drops, (None, *drops)),
            )
        )
    ]
    return LayerPath(
        tuple(layers),
        dtype,
        activations,
        multiply_adds=sum(map(operator.mul, widths, widths[1:])),
        casts=any(weight != dtype for weight, _ in parameters),
        keeps_output=activations[-1] is not IDENTITY and not layers[-1].keeps_z,
        drops=any(drops),
    )


def layer_after_layer(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    path: LayerPath,
    seed: Tensor | None = None,
) -> Tensor:
    """x (M, d_0) -> y (M, d_L), a layer that wants gradients an autograd.Function: they are handed on as they come.

    `seed` is that of the path's Dropout, where it drops.
    """
    dtype = path.dtype
    differentiable = torch.is_grad_enabled()
    needs_grad = differentiable and x.requires_grad
    h = edge = x
    for kernels, weight, bias in zip(path.layers, weights, biases):
        needs_grad = needs_grad or (
            differentiable and (weight.requires_grad or (bias is not None and bias.requires_grad))
        )
        if needs_grad:
            outputs = _LayerFunction.call(edge, h, weight, bias, kernels, seed)
            h, edge = outputs if type(outputs) is tuple else (outputs, outputs)
        else:
            h, _ = kernels.forward(h, _cast(weight, dtype), bias, False, seed)
            edge = h
    return h


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight if weight.dtype == dtype else weight.to(dtype)


class _LayerFunction(PlainFunction):
    """(z_below, W, b) -> z, with h = a(z) beside it; see the top of this module.

    The last layer of a run returns h to its user, whose gradient is dh; an inner one's edge brings dz.
    """

    @staticmethod
    def forward(
        ctx: Any,
        edge: Tensor,
        h_below: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        kernels: LayerKernels,
        seed: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        needs_edge, _, needs_weight, *_ = ctx.needs_input_grad
        compute_weight = _cast(weight, kernels.dtype)
        h, z = kernels.forward(h_below, compute_weight, bias, True, seed)
        # One tensor serves dW and the derivative below. Where nothing below needs a gradient, the edge is h_below.
        kept = edge if needs_weight or (needs_edge and kernels.has_below) else None
        own = None
        if kernels.last and kernels.activation is not IDENTITY:
            own = h if z is None else z
        save(ctx, kept, compute_weight if needs_edge else None, own, seed)
        ctx.kernels = kernels
        if compute_weight is not weight:  # as the user has it, for a gradient that is differentiated
            ctx.master = weight
        if z is None:
            return h
        if not kernels.last:
            ctx.mark_non_differentiable(h)
        return h, z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kernels: LayerKernels = ctx.kernels
        dh, dz = None, grads[-1]
        if kernels.last:
            dh, dz = (None if each is None else plain_gradient(each) for each in (*grads, None)[:2])
            if kernels.activation is IDENTITY and kernels.dropout is None:
                dh, dz = None, dh
        if dh is None and dz is None:
            return None, None, None, None, None, None
        if wants_torch(dz if dh is None else dh):
            with torch.enable_grad():
                d_edge, dw, db = _differentiable_backward(ctx, dh, dz)
        else:
            d_edge, dw, db = _backward(ctx, dh, dz)
        return d_edge, None, dw, db, None, None


def _backward(ctx: Any, dh: Tensor | None, dz: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of (edge, W, b) through the kernels, only those that are wanted."""
    kernels: LayerKernels = ctx.kernels
    kept, weight, own, seed = restore(ctx)
    needs_edge, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    if dh is not None:
        through_activation = kernels.output_gradient(dh, own, seed)
        dz = through_activation if dz is None else through_activation + dz
    assert dz is not None
    d_edge = dw = db = None
    h_below = kept
    if needs_edge:
        saved = kept if kernels.has_below else None
        d_edge, rebuilt = kernels.dgrad(dz, weight, saved, needs_weight and kernels.below_keeps_z, seed)
        h_below = h_below if rebuilt is None else rebuilt
    if needs_weight or needs_bias:
        dw, db = kernels.wgrad(dz, h_below, needs_weight, needs_bias)
    return d_edge, dw, db


def _differentiable_backward(ctx: Any, dh: Tensor | None, dz: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same gradients in plain torch, for when they are to be differentiated themselves."""
    kernels: LayerKernels = ctx.kernels
    kept, weight, own, seed = restore(ctx)
    needs_edge, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    if weight is not None and kernels.weight_dtype != kernels.dtype:
        weight = ctx.master.to(weight.dtype)
    if dh is not None:
        dh = dropped(dh, dropout_factors(seed, kernels.dropout, dh.shape[0], kernels.width_out, kernels.dtype))
        through_activation = dh if own is None else through(kernels.activation, own, dh, kernels.keeps_z)
        dz = through_activation if dz is None else through_activation + dz
    assert dz is not None
    d_edge = dw = db = None
    h_below = kept
    if needs_edge:
        d_edge = dz @ weight
        left = dropout_factors(seed, kernels.dropout_below, dz.shape[0], kernels.width_in, kernels.dtype)
        if kept is None or not (kernels.has_below or kernels.dropout_below):
            d_edge = dropped(d_edge, left)
        else:
            # kept stands on the edge, for z: its own, or as the output that z gave.
            if kernels.below_keeps_z:
                h_below = dropped(kernels.below(kept), left)
            else:
                h_below = _OutputOf.apply(kept, kernels.below, left)
            (d_edge,) = torch.autograd.grad(h_below, kept, d_edge, create_graph=True)
    if needs_weight:
        dw = (dz.t() @ h_below).to(kernels.weight_dtype)
    if needs_bias:
        db = dz.sum(0).to(kernels.bias_dtype)
    return d_edge, dw, db


class _OutputOf(torch.autograd.Function):
    """h as a function of z, evaluated at an edge on which h stands for z: h -> h, with derivative a'(z) read off h.

    `left` is what Dropout has multiplied h by, or None.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, activation: Activation, left: Tensor | None) -> Tensor:
        output = h.clone()
        save(ctx, output, left)
        ctx.activation = activation
        return output

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, None, None]:
        h, left = restore(ctx)
        return ctx.activation.reference_backward(dropped(dh, left), h, *ctx.activation.values), None, None
