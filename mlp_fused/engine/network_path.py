"""The network path: a narrow network is one autograd.Function, (x, W_1 …, b_1 …) -> y, one launch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels import network, network_backward, network_forward
from ..kernels.launch import Launches
from ..kernels.network import Network
from ..kernels.tile_config import TileConfig
from .autograd import (
    PlainFunction,
    differentiable_backward,
    plain_gradient,
    restore,
    save,
    versions,
    wants_torch,
)
from .settings import profiler_enabled

__all__ = ["Formulation", "NetworkPlan", "run_backward", "run_forward", "run_network"]


def run_network(x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], path: NetworkPlan) -> Tensor:
    """The network path: x (M, d_0) -> y (M, d_L)."""
    if path.formulation is None:
        return run_forward(x, weights, biases, path)
    return _NetworkFunction.call(x, path, *weights, *biases)


def _ranged(run: Callable[..., Any]) -> Callable[..., Any]:
    """A profiler shows what a network launches under a range of its name."""

    @functools.wraps(run)
    def in_range(*arguments: Any, **keywords: Any) -> Any:
        if not profiler_enabled():
            return run(*arguments, **keywords)
        with torch.profiler.record_function(run.__name__.replace("run_", "network ")):
            return run(*arguments, **keywords)

    return in_range


@_ranged
def run_forward(
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
        dtypes = [None if parameter is None else parameter.dtype for parameter in (*weights, *biases)]
        key = (x.shape, x.stride(), x.dtype, x.get_device(), keep, *dtypes)
        if not path.launches.again(key, x, y, weights, biases, kept, z, None):
            made = network_forward.network_forward(x, weights, biases, y, net, path.forward, kept=kept, z=z)
            path.launches.remember(key, made)
    return (y, kept, z) if keep else y


class _NetworkFunction(PlainFunction):
    """(x, W_1 …, b_1 …) -> y: a whole network."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, path: NetworkPlan, *parameters: Tensor | None) -> Tensor:
        ctx.path = path
        layers = len(parameters) // 2
        stored = path.formulation == "stored"
        if stored:
            y, kept, z = run_forward(x, parameters[:layers], parameters[layers:], path, keep=True)
            own = None
            if path.network.activates_output:
                own = y if z is None else z
        else:
            y, kept, own = run_forward(x, parameters[:layers], parameters[layers:], path), None, None
        # Saved is what the kernels read, and what has to be let go after backward; the rest may change before it.
        read = range(0 if ctx.needs_input_grad[0] else 1, layers) if stored else range(2 * layers)
        saved = [
            each if index in read or (each is not None and not each.is_leaf) else None
            for index, each in enumerate(parameters)
        ]
        save(ctx, x, kept, own, *saved)
        ctx.others = [each if of_saved is None else None for each, of_saved in zip(parameters, saved)]
        ctx.versions = versions(parameters)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, _, *needs = ctx.needs_input_grad
        x, kept, own, *saved = restore(ctx)
        parameters = [other if each is None else each for each, other in zip(saved, ctx.others)]
        dy = plain_gradient(dy)
        if wants_torch(dy):
            net = ctx.path.network
            dx, gradients = differentiable_backward(
                net.activations, net.dtype, x, parameters, ctx.versions, dy, needs_x, needs
            )
        else:
            dx, gradients = run_backward(ctx.path, x, kept, own, parameters, dy, needs_x, needs)
        return dx, None, *gradients


@_ranged
def run_backward(
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
    sums = tuple([gradient for gradient in by_layer if gradient is not None])
    again = path if net is path.network else replace(path, network=net, launches=Launches())
    launches = again.launches
    dtypes = [None if parameter is None else parameter.dtype for parameter in parameters]
    key = (x.shape, x.stride(), x.dtype, dy.stride(), x.get_device(), needs_x, *needs, *dtypes)
    if path.formulation == "recompute":
        if not launches.again(key, x, dy, dx, weights, biases, None, sums):
            made = network_backward.network_recompute(x, dy, weights, biases, dx, sums, net, wanted, path.backward)
            launches.remember(key, made)
        return dx, gradients
    if path.formulation == "replay":
        y, kept, z = run_forward(x, weights, biases, again, keep=True)
        own = None if not net.activates_output else y if z is None else z
    dz = None if kept is None else torch.empty_like(kept)
    last = None if own is None else torch.empty_like(own)
    if last is not None or wanted.lowest + 1 < layers or needs_x:
        of_chain = ("dgrad", *key)
        if not launches.again(of_chain, dy, dx, weights, kept, own, dz, last):
            launches.remember(
                of_chain,
                network_backward.network_dgrad(dy, weights, kept, own, dz, last, dx, net, wanted, path.backward),
            )
    if sums:
        dy = dy if last is None else last
        of_sums = ("wgrad", *key)
        if not launches.again(of_sums, x, dy, kept, dz, sums):
            launches.remember(of_sums, network_backward.network_wgrad(x, dy, kept, dz, sums, net, wanted, path.wgrad))
    return dx, gradients


# How the network path trains. recompute: one backward kernel runs the forward again. stored: the forward keeps one
# tensor of each hidden layer. replay: x alone is kept, and backward begins with the forward that stores.
Formulation = Literal["recompute", "stored", "replay"]


@dataclass(frozen=True, eq=False)
class NetworkPlan:
    """The network path for some layers on a device: its tiles, and how it trains, with the reason."""

    network: Network
    forward: TileConfig
    formulation: Formulation | None  # None: for inference only
    reason: str
    backward: TileConfig | None  # of the kernel that recomputes, or of the chain of dz
    wgrad: TileConfig
    launches: Launches = field(default_factory=Launches, repr=False)  # that were made

    def kept_elements(self, rows: int) -> int:
        """How many elements are kept for backward."""
        if self.formulation is None:
            return 0
        net = self.network
        if self.formulation != "stored":
            return rows * net.widths[0]
        return rows * (net.widths[0] + net.starts[-1] + net.activates_output * net.widths[-1])

    def kept_shapes(self, rows: int) -> list[tuple[int, ...]]:
        """Of what a forward stores besides x and y, all of the network's dtype."""
        net = self.network
        if self.formulation != "stored":
            return []
        hidden = [(rows * net.starts[-1],)] if net.layers > 1 else []
        return hidden + ([(rows, net.widths[-1])] if net.keeps_z[-1] else [])

    @property
    def explanation(self) -> str:
        """Why the network path, and why this formulation."""
        how = {
            "recompute": "backward recomputes the forward in one pass: ",
            "stored": "the forward stores one tensor a hidden layer: ",
            "replay": "backward begins with the forward again: ",
        }
        trains = f"; {how[self.formulation]}{self.reason}" if self.formulation else ""
        return f"the weights fit on the chip{trains}"
