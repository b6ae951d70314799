"""All layers at once: kernel after kernel, with memory for everything between them allocated in one piece.

Of a small network the host's part is the whole time. Here a repeated call finds all its launches by one key and fills
in pointers; what lies between two kernels is a place in memory and never a tensor. Inference of any size goes this way,
training where the host could not keep up with a layer after the other (`LAUNCH_BOUND`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.activations import IDENTITY
from ..kernels.dropout import draw_seed
from ..kernels.launch import Launch, Program, Slots
from ..kernels.layer_backward import WeightGradient
from .autograd import (
    PlainFunction,
    differentiable_backward,
    dropout_factors,
    plain_gradient,
    restore,
    save,
    versions,
    wants_torch,
)
from .layer_path import LayerPath, layer_after_layer
from .settings import DEBUG, profiler_enabled

__all__ = ["cast", "chained_backward", "chained_forward", "kept_shapes", "run_layers"]

# Multiply-adds of a forward up to which all layers are one autograd.Function: 20 µs of an H200's bf16 forward and
# backward, which the host can hardly launch faster.
LAUNCH_BOUND = 2**31


def run_layers(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    path: LayerPath,
    seed: Tensor | None = None,
) -> Tensor:
    """x (M, d_0) -> y (M, d_L) through a path's kernels, with gradients wherever they are wanted.

    `seed` is that of the path's Dropout; by default a path that drops draws one.
    """
    if x.dtype != path.dtype:
        x = x.to(path.dtype)
    if path.drops and seed is None:
        seed = draw_seed(x.device)
    if not (torch.is_grad_enabled() and any(map(_requires_grad, filter(_given, (*weights, x, *biases))))):
        return chained_forward(x, cast(weights, path), biases, path, False, seed)[0]
    if (
        weights[0].requires_grad  # and so keeps x
        and x.shape[0] * path.multiply_adds <= LAUNCH_BOUND
        and all(map(_is_leaf, filter(_given, (*weights, *biases))))  # others have to be let go after backward
    ):
        return _ChainFunction.call(x, path, seed, *weights, *biases)
    return layer_after_layer(x, weights, biases, path, seed)


_requires_grad, _is_leaf = operator.attrgetter("requires_grad"), operator.attrgetter("is_leaf")


def _given(tensor: Tensor | None) -> bool:
    return tensor is not None


def cast(weights: Sequence[Tensor], path: LayerPath) -> Sequence[Tensor]:
    """As the kernels read them."""
    return [weight.to(path.dtype) for weight in weights] if path.casts else weights


@dataclass(frozen=True)
class Prepared:
    """A schedule's launches as one program."""

    program: Program
    places: tuple[tuple[int, int], ...]  # of which its list of pointers is: the buffer, and where in it, in bytes
    partial: int  # elements that the last buffer holds, for partial sums of weight gradients
    partial_dtype: torch.dtype

    def run(self, buffers: Sequence[Tensor | None]) -> bool:
        """Launch them all; or do nothing and return False, as `Program` does."""
        bases = [None if buffer is None else buffer.data_ptr() for buffer in buffers]
        return self.program([None if (base := bases[buffer]) is None else base + at for buffer, at in self.places])


class Schedule:
    """Kernels one after the other over places in some buffers: as tensors the first time, as pointers from then on."""

    def __init__(self, rows: int, itemsize: int) -> None:
        self.rows = rows
        self.itemsize = itemsize
        self.places: list[tuple[int, int]] = []  # as of `Prepared`
        self.widths: list[int] = []  # of each place; 0: it is the buffer as it is
        self.steps: list[tuple[Callable[..., Any], tuple[int, ...]]] = []
        self.prepared: Prepared | None = None

    def place(self, buffer: int, start: int = 0, width: int = 0) -> int:
        """The slot of a buffer; or of (rows, width) in it, `start` elements on."""
        self.places.append((buffer, start * self.itemsize))
        self.widths.append(width)
        return len(self.places) - 1

    def run(self, buffers: Sequence[Tensor | None], prepared: Prepared | None) -> None:
        """Launch them all. `prepared` is as the caller has read it: another thread may be preparing meanwhile."""
        if prepared is not None and not profiler_enabled() and prepared.run(buffers):
            return
        made = [into(*[self._tensor(buffers, slot) for slot in slots]) for into, slots in self.steps]
        if prepared is None and not DEBUG:  # a program checks nothing between
            self.prepared = self._prepare(made, len(buffers) - 1)

    def _tensor(self, buffers: Sequence[Tensor | None], slot: int) -> Tensor | None:
        (buffer, at), width = self.places[slot], self.widths[slot]
        whole = buffers[buffer]
        if whole is None or width == 0:
            return whole
        start = at // self.itemsize
        return whole[start : start + self.rows * width].view(self.rows, width)

    def _prepare(self, made: Sequence[Any], buffer: int) -> Prepared | None:
        """Of what the steps have made; None where one is torch's, or not aligned. `buffer` is that of partial sums."""
        steps: list[tuple[Launch, Slots]] = []
        places = list(self.places)
        partial, partial_dtype = 0, torch.float32
        for launch, (_, slots) in zip(made, self.steps):
            if isinstance(launch, Launch):
                steps.append((launch, slots))
                continue
            if not isinstance(launch, WeightGradient):
                return None
            (dz, h, dw, db), sums = slots, launch.partial
            if not sums.size_w:  # h is not read then
                h = dz
            if launch.total is None:
                steps.append((launch.products, (dz, h, dw, db)))
                continue
            whole, start_b = len(places), len(places) + 1
            places += [(buffer, 0), (buffer, sums.start_b * sums.dtype.itemsize)]
            partial, partial_dtype = max(partial, sums.splits * sums.columns), sums.dtype
            into = (whole if sums.size_w else dw, start_b if sums.size_b else db)
            totals = tuple(slot for slot, size in ((dw, sums.size_w), (db, sums.size_b)) if size)
            steps += [(launch.products, (dz, h, *into)), (launch.total, (whole, totals))]
        program = Program.of(steps)
        return None if program is None else Prepared(program, tuple(places), partial, partial_dtype)


def _room(rows: int, width: int) -> int:
    """Elements for (rows, width), so that what follows is aligned as an allocation's beginning is."""
    return -(-rows * width // 64) * 64


class Forward:
    """y, and what is kept for backward, for x, parameters of certain shapes and strides, and a seed where layers drop.

    Attributes:
        edges: of each layer, where in what is kept lies what backward reads of it: z, or h; None where y is that.
    """

    def __init__(self, path: LayerPath, rows: int, keep: bool) -> None:
        count = len(path.layers)
        self.schedule = schedule = Schedule(rows, path.dtype.itemsize)
        x, kept, spare, y, seed, nothing = 0, *range(2 * count + 1, 2 * count + 6)
        places: list[tuple[Any, Any]] = []  # of h and z
        # The shape of what is kept, where anything is; and how much of it has its place.
        self.kept = next(iter(kept_shapes(path, rows)), None) if keep else None
        placed = 0
        turns = [0, 0]  # sizes of the two places that layers which are not kept take in turn
        for index, kernels in enumerate(path.layers):
            size = _room(rows, kernels.width_out)
            h = z = None
            if keep and kernels.keeps_z:
                z = placed
                placed += size
            elif keep and not kernels.last:
                h = placed
                placed += size
            if h is None and not kernels.last:
                turns[index % 2] = max(turns[index % 2], size)
            places.append((h, z))
        self.spare = sum(turns)
        self.spares = any(h is None for h, _ in places[:-1])
        self.edges = [h if z is None else z for h, z in places]
        below, none, at_seed = schedule.place(x), schedule.place(nothing), schedule.place(seed)
        for index, (kernels, (h, z)) in enumerate(zip(path.layers, places)):
            width = kernels.width_out
            at_z = none if z is None else schedule.place(kept, z, width)
            if kernels.last:
                at_h = schedule.place(y)
            elif h is not None:
                at_h = schedule.place(kept, h, width)
            else:
                at_h = schedule.place(spare, turns[0] * (index % 2), width)
            parameters = schedule.place(1 + index), schedule.place(1 + count + index)
            dropping = () if kernels.dropout is None else (at_seed,)
            schedule.steps.append((kernels.forward_into, (below, *parameters, at_h, at_z, *dropping)))
            below = at_h
        self.width_out = path.layers[-1].width_out

    def __call__(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], seed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """y and what is kept."""
        y = x.new_empty((self.schedule.rows, self.width_out))
        kept = None if self.kept is None else x.new_empty(self.kept)
        spare = x.new_empty((self.spare,)) if self.spares else None
        self.schedule.run((x, *weights, *biases, kept, spare, y, seed, None), self.schedule.prepared)
        return y, kept


def kept_shapes(path: LayerPath, rows: int) -> list[tuple[int, ...]]:
    """Of what a forward keeps besides x, y and the weights: one tensor, without a gap at its end; or nothing."""
    widths = [each.width_out for each in path.layers if each.keeps_z or not each.last]
    return [(sum(_room(rows, width) for width in widths[:-1]) + rows * widths[-1],)] if widths else []


def chained_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    path: LayerPath,
    keep: bool,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y and, with `keep`, what is kept of the layers between; x and weights are of the path's dtype.

    `seed` is that of the path's Dropout, where it drops.
    """
    strides = [None if each is None else each.stride() for each in (x, *weights, *biases)]
    key = (keep, x.shape, x.get_device(), *strides)
    forward = path.chains.get(key)
    if forward is None:
        forward = path.chains[key] = Forward(path, x.shape[0], keep)
    return forward(x, weights, biases, seed)


class Backward:
    """dx and the gradients of all parameters, those that are wanted, from what a `Forward` kept."""

    def __init__(
        self, path: LayerPath, rows: int, needs_x: bool, needs: Sequence[bool], parameters: Sequence[Tensor | None]
    ) -> None:
        count = len(path.layers)
        layers = path.layers
        self.shape_of_x = (rows, layers[0].width_in) if needs_x else None
        # torch.empty_like is the faster, and right where a parameter is contiguous.
        self.gradients = [
            (index, None if parameter.is_contiguous() else parameter.shape, parameter.dtype)
            for index, (parameter, need) in enumerate(zip(parameters, needs))
            if need and parameter is not None
        ]
        edges = Forward(path, rows, keep=True).edges
        self.schedule = schedule = Schedule(rows, path.dtype.itemsize)
        dy, y, x = 0, 1, 2
        kept, spare, seed, dx, nothing = count + 3, count + 4, count + 5, count + 6, 3 * count + 7
        none, at_seed = schedule.place(nothing), schedule.place(seed)
        at_edge = [
            schedule.place(y) if edge is None else schedule.place(kept, edge, kernels.width_out)
            for kernels, edge in zip(layers, edges)
        ]
        biggest = max(_room(rows, kernels.width_out) for kernels in layers)
        # dz takes two places in turn; a third is for what is rebuilt of a layer's output.
        at_dz = [
            schedule.place(spare, biggest * (index % 2), kernels.width_out) for index, kernels in enumerate(layers)
        ]
        self.spare = 3 * biggest
        dz = schedule.place(dy)
        activates, drops = path.activations[-1] is not IDENTITY, layers[-1].dropout is not None
        if activates or drops:
            slots = (dz, at_edge[-1] if activates else none, at_dz[-1], none, *((at_seed,) if drops else ()))
            schedule.steps.append((layers[-1].output_gradient_into, slots))
            dz = at_dz[-1]
        for index in reversed(range(count)):
            kernels = layers[index]
            needs_weight, needs_bias = needs[index], needs[count + index]
            h = at_edge[index - 1] if index else schedule.place(x)
            below = none
            if index or needs_x:
                below = at_dz[index - 1] if index else schedule.place(dx)
                saved, rebuilt = h if kernels.has_below else none, none
                if needs_weight and kernels.below_keeps_z:
                    h = rebuilt = schedule.place(spare, 2 * biggest, kernels.width_in)
                slots = (dz, schedule.place(3 + index), saved, below, rebuilt)
                dropping = () if kernels.dropout_below is None else (at_seed,)
                schedule.steps.append((kernels.dgrad_into, (*slots, *dropping)))
            if needs_weight or needs_bias:
                dw = schedule.place(dx + 1 + index) if needs_weight else none
                db = schedule.place(dx + 1 + count + index) if needs_bias else none
                schedule.steps.append((kernels.wgrad_into, (dz, h if needs_weight else none, dw, db)))
            dz = below

    def __call__(
        self,
        dy: Tensor,
        y: Tensor | None,
        x: Tensor,
        kept: Tensor | None,
        weights: Sequence[Tensor | None],
        parameters: Sequence[Tensor | None],
        seed: Tensor | None,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """dx, and the gradients of W_1 …, b_1 …; `parameters` are as the user has them, `weights` as kernels read."""
        dx = None if self.shape_of_x is None else x.new_empty(self.shape_of_x)
        gradients: list[Tensor | None] = [None] * len(parameters)
        for index, shape, dtype in self.gradients:
            parameter: Any = parameters[index]
            gradients[index] = torch.empty_like(parameter) if shape is None else dy.new_empty(shape, dtype=dtype)
        spare, partial, prepared = dy.new_empty((self.spare,)), None, self.schedule.prepared
        if prepared is not None and prepared.partial:
            partial = dy.new_empty((prepared.partial,), dtype=prepared.partial_dtype)
        buffers = (dy, y, x, *weights, kept, spare, seed, dx, *gradients, None, partial)
        self.schedule.run(buffers, prepared)
        return dx, gradients


def chained_backward(
    path: LayerPath,
    dy: Tensor,
    y: Tensor | None,
    x: Tensor,
    kept: Tensor | None,
    weights: Sequence[Tensor | None],
    parameters: Sequence[Tensor | None],
    needs_x: bool,
    needs: Sequence[bool],
    seed: Tensor | None = None,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx and the gradients of W_1 …, b_1 …, those that are needed.

    Args:
        y: the output, where the last activation's derivative is read off it.
        kept, seed: as of `chained_forward`.
        weights: of the path's dtype; the first may be None where dx is not needed.
        parameters: all of them as the user has them, of which the gradients take dtype and layout.
    """
    strides = [None if each is None else each.stride() for each in (dy, y, x, *weights, *parameters)]
    key = (x.shape, x.get_device(), needs_x, *needs, *strides)
    backward = path.chains.get(key)
    if backward is None:
        backward = path.chains[key] = Backward(path, x.shape[0], needs_x, needs, parameters)
    return backward(dy, y, x, kept, weights, parameters, seed)


class _ChainFunction(PlainFunction):
    """(x, W_1 …, b_1 …) -> y, of which the first weight at least wants a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, path: LayerPath, seed: Tensor | None, *parameters: Any) -> Tensor:
        count = len(path.layers)
        weights = cast(parameters[:count], path)
        y, kept = chained_forward(x, weights, parameters[count:], path, True, seed)
        first = weights[0] if ctx.needs_input_grad[0] else None
        save(ctx, x, y if path.keeps_output else None, kept, seed, first, *weights[1:])
        ctx.path = path
        # As the user has them, for a gradient that is differentiated; saved above is what the kernels read.
        ctx.parameters, ctx.versions = parameters, versions(parameters)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        path: LayerPath = ctx.path
        needs_x, _, _, *needs = ctx.needs_input_grad
        x, y, kept, seed, *weights = restore(ctx)
        dy = plain_gradient(dy)
        if wants_torch(dy):
            factors = [
                dropout_factors(seed, kernels.dropout, x.shape[0], kernels.width_out, path.dtype)
                for kernels in path.layers
            ]
            dx, gradients = differentiable_backward(
                path.activations, path.dtype, x, ctx.parameters, ctx.versions, dy, needs_x, needs, factors
            )
        else:
            dx, gradients = chained_backward(path, dy, y, x, kept, weights, ctx.parameters, needs_x, needs, seed)
        return dx, None, None, *gradients
