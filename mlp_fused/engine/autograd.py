"""The autograd.Functions of the two paths, and their gradients in plain torch, which can be differentiated again."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.activation import Activation
from ..kernels.activations import IDENTITY
from ..kernels.dropout import Dropout, draw_seed, saves_preactivation
from ..kernels.layer_forward import pointwise
from .layer_path import LayerPath
from .network_path import NetworkPath
from .section import Section
from .settings import is_batched, is_transformed, is_zero_tensor

__all__ = ["plain_gradient", "run_layers", "run_network", "run_path", "sections"]

# The most multiply-adds of a 16-bit forward whose layers are all in one autograd.Function. In larger networks, each
# layer has a Function: its gradients are then passed on, to DDP for example, and its saved tensors freed before the
# backward of the layer below. One Function for each layer costs time unless the kernels take longer than Python: with
# four layers and 2^36 multiply-adds, a training call took 1.5 ms on an H200 (torch 2.11, Triton 3.6), and its kernels
# 0.83 ms. Passing gradients on early saves at most the kernels' time, and up to the bound this time is short. One
# Function for all layers takes 6 to 56 MiB more memory at its peak (bf16, 2^33.6 to 2^36.4 multiply-adds, counted on a
# CPU): the gradients of all weights and one or two gradients of an output.
LAUNCH_BOUND = 2**37
FP32_WORK = 4  # one multiply-add in fp32 counts as this many in 16 bits


def run_path(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], path: NetworkPath | LayerPath
) -> Tensor:
    """Run a path, x (M, d_0) -> y (M, d_L), and record the gradients that are wanted."""
    run: Any = run_layers if isinstance(path, LayerPath) else run_network
    result: Tensor = run(x, weights, biases, path)
    return result


def run_network(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], path: NetworkPath) -> Tensor:
    """Run the network path, x (M, d_0) -> y (M, d_L)."""
    seed = draw_seed(x.device) if path.drops else None
    y: Tensor
    if path.formulation is None:
        y, _ = path.forward((x, x, seed, *weights, *biases), None)
    else:
        y = SectionFunction.call(path, seed, x, x, *weights, *biases)
    return y


def run_layers(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    path: LayerPath,
    seed: Tensor | None = None,
) -> Tensor:
    """Run the layer path, x (M, d_0) -> y (M, d_L).

    `seed` is the seed of the path's Dropout; by default, a path with Dropout draws one.
    """
    if x.dtype != path.dtype:
        x = x.to(path.dtype)
    if path.drops and seed is None:
        seed = draw_seed(x.device)
    end = len(path.layers)
    first = _first_trainable(x, weights, biases) if torch.is_grad_enabled() else end
    h: Tensor = x
    if first:  # the layers before it need no gradient and save nothing
        h = path.section(0, first).forward((h, h, seed, *weights[:first], *biases[:first]), None)[0]
        if first == end:
            return h
    edge = h
    for begin, after in itertools.pairwise(_bounds(path, x.shape[0], first, weights[first].requires_grad)):
        outputs = SectionFunction.call(
            path.section(begin, after), seed, h, edge, *weights[begin:after], *biases[begin:after]
        )
        h, edge = outputs if type(outputs) is tuple else (outputs, outputs)
    return h


def _bounds(path: LayerPath, rows: int, first: int, saves_x: bool) -> list[int]:
    """The first layers of the sections, from layer `first` on, and the end of the last section.

    All layers are one section if their multiply-adds do not exceed `LAUNCH_BOUND`. Otherwise each layer is a section.
    A section of several layers always saves its input. If the first layer's weight does not need the input
    (`saves_x` is False), each layer is a section too, so that the first one need not save it.
    """
    end = len(path.layers)
    work = rows * path.multiply_adds * (FP32_WORK if path.dtype.itemsize > 2 else 1)
    is_small = work <= LAUNCH_BOUND
    return [first, end] if is_small and saves_x else list(range(first, end + 1))


def sections(
    path: NetworkPath | LayerPath, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[tuple[Section, tuple[bool, ...] | None]]:
    """The sections of a path, with the `needs` of each: see `Section`. None for layers that save nothing."""
    end, first = len(weights), _first_trainable(x, weights, biases)
    needs_weights = [weight.requires_grad for weight in weights]
    needs_biases = [bias is not None and bias.requires_grad for bias in biases]
    if isinstance(path, NetworkPath):
        return [(path, (x.requires_grad, *needs_weights, *needs_biases) if first < end else None)]
    frozen: list[tuple[Section, None]] = [(path.section(0, first), None)] if first else []
    bounds = _bounds(path, x.shape[0], first, needs_weights[first]) if first < end else []
    return frozen + [
        (
            path.section(begin, after),
            (x.requires_grad or begin > first, *needs_weights[begin:after], *needs_biases[begin:after]),
        )
        for begin, after in itertools.pairwise(bounds)
    ]


def _first_trainable(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> int:
    """The first layer whose input or parameters need a gradient; the number of layers if none does."""
    if x.requires_grad:
        return 0
    for index, (weight, bias) in enumerate(zip(weights, biases)):
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return index
    return len(weights)


class PlainFunction(torch.autograd.Function):
    """An autograd.Function for plain tensors, without support for torch.func transforms."""

    @classmethod
    def call(cls, *arguments: Any) -> Any:
        """Call `apply`, but do not search for tensors of torch.func transforms: none come here, and it saves 2 µs."""
        return super(torch.autograd.Function, cls).apply(*arguments)  # type: ignore[misc]


class SectionFunction(PlainFunction):
    """A section of the layer path, or a whole network: (h, edge, W …, b …) -> h, or (h, edge).

    The edge from below is the saved tensor of the layer below, z or h itself. Its gradient is dz. A section returns an
    edge besides h if the edge is z. The last section returns the network's output, whose gradient is dy. A network has
    no edges: its input is passed as h and as the edge.
    """

    @staticmethod
    def forward(
        ctx: Any, section: Section, seed: Tensor | None, h: Tensor, edge: Tensor, *parameters: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.section = section
        y: Tensor
        needs = ctx.needs_input_grad[3:]
        y, z, *saved = section.forward((h, edge, seed, *parameters), needs)
        save(ctx, parameters, saved, section.saved(needs).read)
        if z is None:
            return y
        ctx.mark_non_differentiable(y)
        return y, z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dy = gradients[-1]
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        dy = plain_gradient(dy)
        section: Section = ctx.section
        needs = ctx.needs_input_grad[3:]
        parameters, saved = restore(ctx)
        names, read, _ = section.saved(needs)
        by_torch = wants_torch(dy)
        if (now := versions(parameters)) != ctx.versions:
            refuse_changed(section.parameters, ctx.versions, now, range(len(now)) if by_torch else read)
        if ctx.parameters is not None:  # autograd saves the memory of the others
            refuse_moved(section.parameters, ctx.storages, storages(parameters, read), read)
        if by_torch:
            return None, None, None, *differentiable_backward(section, dict(zip(names, saved)), parameters, dy, needs)
        if not all(map(Tensor.is_contiguous, saved)):  # hooks on saved tensors may change strides
            saved = [tensor if name == "x" else tensor.contiguous() for name, tensor in zip(names, saved)]
        return None, None, None, *section.backward(dy, saved, laid_out(parameters, section.strides), needs)


def save(ctx: Any, parameters: Sequence[Tensor | None], tensors: Sequence[Tensor], read: Iterable[int]) -> None:
    """Save tensors and parameters for backward, with the versions of the parameters.

    `read` has the indices of the parameters whose values the backward reads.

    Parameters that somebody else holds anyway are stored on `ctx`: leaves that need a gradient, and every nn.Parameter
    that is a leaf. If there are others, autograd saves all parameters, so that backward frees them. A frozen weight
    that was dequantized for this call is an example.
    """
    are_held = False not in [
        parameter is None or (parameter.is_leaf and (type(parameter) is nn.Parameter or parameter.requires_grad))
        for parameter in parameters
    ]
    ctx.parameters = parameters if are_held else None
    ctx.versions = versions(parameters)
    if are_held:
        ctx.storages = storages(parameters, read)
    else:
        tensors = [*tensors, *(parameter for parameter in parameters if parameter is not None)]
    ctx.save_for_backward(*tensors)


def restore(ctx: Any) -> tuple[Sequence[Tensor | None], Sequence[Tensor]]:
    """(parameters, tensors) as they were given to `save`."""
    tensors = ctx.saved_tensors
    if ctx.parameters is not None:
        return ctx.parameters, tensors
    count = len(tensors) - sum(version is not None for version in ctx.versions)
    parameters = iter(tensors[count:])
    return [None if version is None else next(parameters) for version in ctx.versions], tensors[:count]


def versions(tensors: Sequence[Tensor | None]) -> list[int | None]:
    """The versions of tensors, by which torch counts in-place changes; None for a tensor that is None."""
    try:
        return [None if tensor is None else tensor._version for tensor in tensors]
    except RuntimeError:  # tensors created in inference mode have no version
        return [None if tensor is None else -1 if tensor.is_inference() else tensor._version for tensor in tensors]


def refuse_changed(
    names: Sequence[str], before: Sequence[int | None], now: Sequence[int | None], read: Iterable[int]
) -> None:
    """Raise an error if a parameter that the backward reads was changed in place since the forward.

    Args:
        names, before, now: for each parameter, its name and its versions in the forward and in the backward.
        read: the indices of the parameters that the backward reads.

    Raises:
        RuntimeError: with the wording of torch's own error.
    """
    for index in read:
        if before[index] != now[index]:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{names[index]} is at version {now[index]}; the forward computed with version "
                f"{before[index]}; change it after backward, or change a clone of it"
            )


def storages(parameters: Sequence[Tensor | None], indices: Iterable[int]) -> list[Any]:
    """The storages of the parameters with these indices, which `parameter.data = …` replaces."""
    chosen = [parameters[index] for index in indices]
    return [None if parameter is None else parameter.untyped_storage() for parameter in chosen]


def refuse_moved(names: Sequence[str], before: Sequence[Any], now: Sequence[Any], read: Iterable[int]) -> None:
    """Raise an error if a parameter that the backward reads has other memory than in the forward.

    Raises:
        RuntimeError: it has, after `parameter.data = …` or `model.half()` for example.
    """
    if not all(map(operator.is_, before, now)):
        moved = next(names[index] for index, old, new in zip(read, before, now) if old is not new)
        raise RuntimeError(
            f"{moved} has other memory than in the forward, after .data = … or .to(…) for example, and the backward "
            "cannot read the old values; change it before the forward or after the backward"
        )


def laid_out(tensors: Sequence[Any], strides: Sequence[tuple[int, ...]]) -> Sequence[Any]:
    """The tensors with these strides, copied if `parameter.data = …` or hooks on saved tensors changed the strides."""
    present = [stride if tensor is None else tensor.stride() for tensor, stride in zip(tensors, strides)]
    if present == strides:
        return tensors
    return [
        None
        if tensor is None
        else torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        for tensor, stride in zip(tensors, strides)
    ]


def plain_gradient(dy: Tensor) -> Tensor:
    """dy as a tensor that kernels can read: dense, with its own memory, without lazy negation."""
    if dy.layout != torch.strided:
        dy = dy.to_dense()
    elif is_zero_tensor(dy):
        dy = dy.clone()
    return dy.resolve_neg()


def wants_torch(gradient: Tensor) -> bool:
    """True if a backward has to run in plain torch, because it is itself differentiated or batched by vmap."""
    return torch.is_grad_enabled() or is_transformed() or is_batched(gradient)


def dropout_factors(
    seed: Tensor | None, dropout: Dropout | None, rows: int, width: int, dtype: torch.dtype
) -> Tensor | None:
    """The mask of a layer's Dropout, divided by 1 - p, (rows, width), in float32 or float64; None without Dropout."""
    if seed is None or dropout is None:
        return None
    ones = seed.new_ones((rows, width), dtype=torch.promote_types(dtype, torch.float32))
    pointwise(ones, ones, IDENTITY, seed=seed, dropout=dropout)
    return ones


def dropped(h: Tensor, factors: Tensor | None) -> Tensor:
    """h with Dropout's factors applied, in h's dtype."""
    return h if factors is None else (h * factors).to(h.dtype)


def activated(z: Tensor, activation: Activation) -> Tensor:
    """a(z), which can be differentiated twice. torch itself can differentiate some activations only once."""
    if activation.reference_backward is None:
        return activation(z)
    with torch.no_grad():
        h = activation(z)
    differentiable: Tensor = _FromOutput.call(z, h, activation, None)
    return differentiable


def differentiable_backward(
    section: Section,
    saved: Mapping[str, Tensor],
    parameters: Sequence[Any],
    dy: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """[dx, dW …, db …] in plain torch, so that they can be differentiated. `saved` are the saved tensors by name."""
    rows, seed, dtype, widths = dy.shape[0], saved.get("seed"), section.dtype, section.widths
    activations = list(section.activations)
    factors = [
        dropout_factors(seed, dropout, rows, width, dtype)
        for dropout, width in zip(section.dropouts or [None] * len(activations), widths[1:])
    ]
    if not section.is_last:  # dy is the gradient of the last layer's z
        activations[-1], factors[-1] = IDENTITY, None
    x = saved.get("x")
    if x is None:  # a single layer without dW and without derivatives: no gradient depends on x
        x = dy.new_zeros((rows, widths[0]), requires_grad=needs[0])
    with torch.enable_grad():
        # Views, so that a tensor that is given twice has a gradient for each of its uses.
        given = [tensor.view_as(tensor) if need else tensor for tensor, need in zip((x, *parameters), needs)]
        h = (output_below(section, given[0], seed) if needs[0] else given[0]).to(dtype)
        cast: list[Any] = [None if tensor is None else tensor.to(dtype) for tensor in given[1:]]
        for weight, bias, activation, factor in zip(cast, cast[len(activations) :], activations, factors):
            h = dropped(activated(F.linear(h, weight, bias), activation), factor)
        inputs = [tensor for tensor, need in zip(given, needs) if need]
        gradients = iter(torch.autograd.grad(h, inputs, dy, create_graph=True))
    return [next(gradients) if need else None for need in needs]


def output_below(section: Section, edge: Tensor, seed: Tensor | None) -> Tensor:
    """The output of the layer below a section, as a function of the edge: z, or the output itself."""
    below, dropout = section.below, section.dropout_below
    factors = dropout_factors(seed, dropout, edge.shape[0], edge.shape[1], section.dtype)
    if below is IDENTITY and factors is None:
        return edge
    if saves_preactivation(below, dropout):
        return dropped(below(edge), factors)
    output: Tensor = _FromOutput.call(edge, edge.detach(), below, factors)
    return output


class _FromOutput(PlainFunction):
    """(z, h) -> h, which is a(z) after Dropout. The derivative a'(z) is computed from h.

    `factors` are the factors by which Dropout has multiplied h; None without Dropout. The gradient is that of z. For an
    edge that is h itself, the caller passes the edge as z and the detached edge as h.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, h: Tensor, activation: Activation, factors: Tensor | None) -> Tensor:
        output = h.clone()
        ctx.save_for_backward(output, *(() if factors is None else (factors,)))
        ctx.activation = activation
        return output

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, None, None, None]:
        h, *factors = ctx.saved_tensors
        dh = dropped(dh, factors[0] if factors else None)
        return ctx.activation.reference_backward(dh, h, *ctx.activation.values), None, None, None
