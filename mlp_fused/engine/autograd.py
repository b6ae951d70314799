"""The autograd.Functions of the two paths, and their gradients in plain torch, which can be differentiated again."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.activation import Activation
from ..kernels.activations import IDENTITY
from ..kernels.dropout import SEED_BYTES, Dropout, draw_seed
from ..kernels.layer_forward import pointwise
from .layer_path import LayerPath, Section
from .network_path import NetworkPath
from .settings import is_batched, is_transformed, is_zero_tensor

__all__ = ["plain_gradient", "run_layers", "run_network", "run_path", "saved_bytes"]

# Up to this many multiply-adds in a forward in 16 bits, all layers are one autograd.Function. Larger layers have one
# each: their gradients are then passed on one by one, to DDP for example, and their saved tensors are freed layer by
# layer. That is free only while the kernels take longer than Python. With one Function for each of four layers, a
# training call took 1.5 ms on an H200 (torch 2.11, Triton 3.6), its kernels 0.83 ms for 2^36 multiply-adds. Below the
# bound, overlap could hide no more than that. One Function takes 6 to 56 MiB more at its peak (bf16, 2^33.6 to 2^36.4
# multiply-adds, counted on a CPU): the gradients of all weights and one or two of an output.
LAUNCH_BOUND = 2**37
FP32_WORK = 4  # the multiply-adds in 16 bits that take at most as long as one in fp32, however that is multiplied


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
    if path.formulation is None:
        return path.forward(x, weights, biases, False, seed)[0]
    y: Tensor = NetworkFunction.call(x, path, seed, *weights, *biases)
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
    if first:  # the layers before need no gradient and save nothing
        section = path.section(0, first)
        h = section.forward(h, weights[:first], biases[:first], False, seed)[0]
        if first == end:
            return h
    edge = h
    for begin, after in itertools.pairwise(_bounds(path, x.shape[0], first, weights[first].requires_grad)):
        outputs = SectionFunction.call(
            edge, h, path.section(begin, after), seed, *weights[begin:after], *biases[begin:after]
        )
        h, edge = outputs if type(outputs) is tuple else (outputs, outputs)
    return h


def _bounds(path: LayerPath, rows: int, first: int, keeps_x: bool) -> list[int]:
    """The first layers of the sections, from layer `first` on, and the end of the last section.

    A section of several layers always saves its input. If the first layer's weight does not need the input, every layer
    is a section of its own.
    """
    end = len(path.layers)
    work = rows * path.multiply_adds * (FP32_WORK if path.dtype.itemsize > 2 else 1)
    is_small = work <= LAUNCH_BOUND
    return [first, end] if is_small and keeps_x else list(range(first, end + 1))


def saved_bytes(
    path: NetworkPath | LayerPath,
    rows: int,
    input_size: int,
    needs_x: bool,
    weights: Sequence[bool],
    biases: Sequence[bool],
) -> int:
    """The bytes that a forward saves for backward, without the parameters.

    Args:
        input_size: bytes of an element of the input.
        needs_x, weights, biases: True where the gradient of the input, of a weight or of a bias is wanted.
    """
    size = path.dtype.itemsize
    if isinstance(path, NetworkPath):
        if path.formulation is None:
            return 0
        kept = sum(map(math.prod, path.kept_shapes(rows))) + rows * path.network.widths[-1] * path.keeps_output
        return rows * path.network.widths[0] * input_size + kept * size + SEED_BYTES * path.drops
    wanted = [needs_x, *map(operator.or_, weights, biases)]
    if not any(wanted):
        return 0
    first = max(0, wanted.index(True) - 1)
    saved = SEED_BYTES * path.drops
    for begin, after in itertools.pairwise(_bounds(path, rows, first, weights[first])):
        section = path.section(begin, after)
        elements = sum(map(math.prod, section.kept_shapes(rows)))
        elements += rows * section.layers[0].width_in * _keeps_edge(section, any(wanted[: begin + 1]), weights[begin])
        elements += rows * section.layers[-1].width_out * section.keeps_output
        elements += sum(spec.width_in * spec.width_out for spec, cast in zip(section.layers, section.cast) if cast)
        saved += elements * size
    return saved


def _keeps_edge(section: Section, needs_edge: bool, needs_weight: bool) -> bool:
    """True if the edge from below is saved. A single layer needs it only for dW and for the derivative below."""
    return len(section.layers) > 1 or needs_weight or (needs_edge and section.layers[0].below is not IDENTITY)


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
        """Call `apply` without its search for tensors of torch.func transforms, which saves 2 µs. None come here."""
        return super(torch.autograd.Function, cls).apply(*arguments)  # type: ignore[misc]


class SectionFunction(PlainFunction):
    """A section of the layer path: (edge, h, W …, b …) -> h, or (h, edge) if the edge to the next section is z.

    The edge from below is the saved tensor of the layer below, z or h itself. Its gradient is dz. The last section
    returns the network's output, whose gradient is dy.
    """

    @staticmethod
    def forward(
        ctx: Any, edge: Tensor, h: Tensor, section: Section, seed: Tensor | None, *parameters: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        count = len(section.layers)
        weights: Any = parameters[:count]
        y: Tensor
        y, z, kept, *casts = section.forward(h, weights, parameters[count:], True, seed)
        needs_edge, _, _, _, needs_weight, *_ = ctx.needs_input_grad
        edge_read = edge if _keeps_edge(section, needs_edge, needs_weight) else None
        if not needs_edge:
            casts[0] = None
        save(ctx, parameters, edge_read, y if section.keeps_output else None, kept, seed, *casts)
        ctx.section, ctx.rows = section, h.shape[0]
        if z is None:
            return y
        ctx.mark_non_differentiable(y)
        return y, z

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        section: Section = ctx.section
        needs_edge, _, _, _, *needs = ctx.needs_input_grad
        dy = gradients[-1]
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        dy = plain_gradient(dy)
        parameters, (edge, y, kept, seed, *casts) = restore(ctx)
        if wants_torch(dy):
            dx, dparameters = differentiable_section(ctx, section, edge, parameters, dy, needs_edge, needs, seed)
        else:
            x = edge if edge is not None else dy.new_empty((ctx.rows, 0))
            weights: Sequence[Any] = [weight if cast is None else cast for weight, cast in zip(parameters, casts)]
            if not needs_edge:  # the first weight is read only to compute the gradient of the edge
                weights = [None, *weights[1:]]
            read = [place for place, (weight, cast) in enumerate(zip(weights, casts)) if weight is not cast]
            check_unchanged(ctx, parameters, read, section.layers[0].index)
            y, kept = contiguous(y), contiguous(kept)
            weights = laid_out(weights, section.strides)
            dx, dparameters = section.backward(dy, x, y, kept, weights, needs_edge, needs, seed)
        return dx, None, None, None, *dparameters


class NetworkFunction(PlainFunction):
    """A whole network on the network path: (x, W_1 …, b_1 …) -> y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, path: NetworkPath, seed: Tensor | None, *parameters: Tensor | None) -> Tensor:
        count = len(parameters) // 2
        weights: Any = parameters[:count]
        y, kept = path.forward(x, weights, parameters[count:], path.stores, seed)
        hidden, z = kept if path.stores else (None, None)
        save(ctx, parameters, x, hidden, y if path.keeps_output else z, seed)
        ctx.path = path
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        path: NetworkPath = ctx.path
        needs_x, _, _, *needs = ctx.needs_input_grad
        parameters, (x, kept, own, seed) = restore(ctx)
        dy = plain_gradient(dy)
        if wants_torch(dy):
            check_unchanged(ctx, parameters, range(len(parameters)))
            factors = [
                dropout_factors(seed, dropout, x.shape[0], width, path.dtype)
                for dropout, width in zip(path.dropouts, path.network.widths[1:])
            ]
            arguments = (path.activations, path.dtype, x, parameters, dy, needs_x, needs)
            dx, dparameters = differentiable_backward(*arguments, factors or itertools.repeat(None))
        else:
            check_unchanged(ctx, parameters, path.parameters_read(needs_x))
            parameters = laid_out(parameters, path.strides)
            dx, dparameters = path.backward(dy, x, contiguous(kept), contiguous(own), parameters, needs_x, needs, seed)
        return dx, None, None, *dparameters


# ------------------------------------------------------------ what is saved


def save(ctx: Any, parameters: Sequence[Tensor | None], *tensors: Tensor | None) -> None:
    """Save tensors and parameters for backward, with the versions of the parameters.

    Parameters that are all leaves are stored on `ctx`, because they live as long as the module. Others are saved by
    autograd, so that backward frees them. A tensor that is None is not saved, because graph drawers ask every saved
    tensor for its size.
    """
    are_leaves = False not in [parameter is None or parameter.is_leaf for parameter in parameters]
    ctx.parameters = parameters if are_leaves else None
    ctx.versions = versions(parameters)
    if not are_leaves:
        tensors += (*parameters,)
    ctx.absent = [index for index, tensor in enumerate(tensors) if tensor is None]
    ctx.save_for_backward(*[tensor for tensor in tensors if tensor is not None])


def restore(ctx: Any) -> tuple[Sequence[Any], list[Any]]:
    """(parameters, tensors) as they were given to `save`, in the same order, None included."""
    tensors = list(ctx.saved_tensors)
    for index in ctx.absent:
        tensors.insert(index, None)
    if ctx.parameters is not None:
        return ctx.parameters, tensors
    count = len(tensors) - len(ctx.versions)
    return tensors[count:], tensors[:count]


def versions(tensors: Sequence[Tensor | None]) -> list[int | None]:
    """The versions of tensors, by which torch counts in-place changes."""
    try:
        return [None if tensor is None else tensor._version for tensor in tensors]
    except RuntimeError:  # tensors created in inference mode have no version
        return [None if tensor is None or tensor.is_inference() else tensor._version for tensor in tensors]


def check_unchanged(ctx: Any, parameters: Sequence[Any], read: Iterable[int], first: int = 0) -> None:
    """Raise an error if a parameter that the backward reads was changed in place since the forward.

    Args:
        read: the indices in `parameters` that the backward reads.
        first: the index of their first layer.

    Raises:
        RuntimeError: with the wording of torch's own error.
    """
    before = ctx.versions
    for place in read:
        if before[place] is not None and before[place] != parameters[place]._version:
            layers = len(parameters) // 2
            name = f"{'weight' if place < layers else 'bias'} {first + place % layers}"
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{name} is at version {parameters[place]._version}; the forward computed with version "
                f"{before[place]}; change it after backward, or change a clone of it"
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


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """The tensor, made contiguous again if hooks on saved tensors changed its strides."""
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


# ------------------------------------------------------------ gradients


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
    """The mask over 1 - p of a layer's Dropout, (rows, width), in float32 or float64; None without Dropout."""
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


def differentiable_section(
    ctx: Any,
    section: Section,
    edge: Tensor | None,
    parameters: Sequence[Any],
    dy: Tensor,
    needs_edge: bool,
    needs: Sequence[bool],
    seed: Tensor | None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Compute `Section.backward` in plain torch, so that its gradients can be differentiated."""
    check_unchanged(ctx, parameters, range(len(parameters)), section.layers[0].index)
    specs, first, rows = section.layers, section.layers[0], dy.shape[0]
    factors = [dropout_factors(seed, spec.dropout, rows, spec.width_out, section.dtype) for spec in specs]
    if edge is None:  # the edge of a single layer that needs neither dW nor a derivative was not saved
        edge = dy.new_zeros((rows, first.width_in))
    left = dropout_factors(seed, first.dropout_below, rows, first.width_in, section.dtype)

    def output_below(edge: Tensor) -> Tensor:
        if not needs_edge or (first.below is IDENTITY and left is None):
            return edge  # if nothing below needs a gradient, the edge is h
        if first.below_keeps_z:
            return dropped(first.below(edge), left)
        output: Tensor = _FromOutput.call(edge, edge.detach(), first.below, left)
        return output

    activations = [spec.activation for spec in specs]
    if not section.is_last:  # dy is the gradient of the last layer's z
        activations[-1], factors[-1] = IDENTITY, None
    return differentiable_backward(
        activations, section.dtype, edge, parameters, dy, needs_edge, needs, factors, output_below
    )


def differentiable_backward(
    activations: Sequence[Activation],
    dtype: torch.dtype,
    x: Tensor,
    parameters: Sequence[Any],
    dy: Tensor,
    needs_x: bool,
    needs: Sequence[bool],
    factors: Iterable[Tensor | None] = itertools.repeat(None),
    output_below: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx, and the gradients of W_1 …, b_1 …, in plain torch, so that they can be differentiated.

    Args:
        factors: for each layer, Dropout's mask over 1 - p; or None.
        output_below: a function from x to the input of the first layer; by default, the input is x.
    """
    layers = len(activations)
    wanted = [needs_x, *needs]
    with torch.enable_grad():
        # Views, so that a tensor that is given twice has a gradient for each of its uses.
        given = [tensor.view_as(tensor) if want else tensor for tensor, want in zip((x, *parameters), wanted)]
        h = (given[0] if output_below is None else output_below(given[0])).to(dtype)
        cast: list[Any] = [None if tensor is None else tensor.to(dtype) for tensor in given[1:]]
        for weight, bias, activation, left in zip(cast, cast[layers:], activations, factors):
            h = dropped(activated(F.linear(h, weight, bias), activation), left)
        inputs = [tensor for tensor, want in zip(given, wanted) if want]
        gradients = iter(torch.autograd.grad(h, inputs, dy, create_graph=True))
    dx, *dparameters = [next(gradients) if want else None for want in wanted]
    return dx, dparameters


class _FromOutput(PlainFunction):
    """(z, h) -> h, which is a(z) after Dropout. The derivative a'(z) is computed from h.

    `left` are the factors that Dropout has multiplied h by, or None. If the edge is h, it is passed as z too.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, h: Tensor, activation: Activation, left: Tensor | None) -> Tensor:
        output = h.clone()
        save(ctx, (), output, left)
        ctx.activation = activation
        return output

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, None, None, None]:
        _, (h, left) = restore(ctx)
        return ctx.activation.reference_backward(dropped(dh, left), h, *ctx.activation.values), None, None, None
