"""The layer path: the schedules of neighbouring layers, forward and backward, with one kernel for each product.

A section is a range of a network's layers, and one autograd.Function. It saves one tensor for each of its layers: the
pre-activation z, or the output h if the derivative can be computed from it.

A section passes the saved tensor of its last layer to the next section. This tensor is called the edge. By convention,
the gradient of an edge is dz. So dgrad can always apply the derivative of the layer below, also if that layer is in
another section. Users never see an edge.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels import devices
from ..kernels.activation import Activation
from ..kernels.activations import IDENTITY
from ..kernels.devices import Device
from ..kernels.dropout import SEED_BYTES, dropouts_of
from .layer_steps import (
    Choose,
    LayerSpec,
    Parameters,
    add_cast,
    add_dgrad,
    add_forward,
    add_output_gradient,
    add_wgrad,
    choose_tile,
)
from .schedule import Cache, Schedule, Step, Work, Writer, named, read

__all__ = ["IDENTITY", "SEED", "LayerPath", "Section", "layer_path"]


@dataclass(frozen=True, eq=False)
class LayerPath:
    """The layer path for some layers.

    Attributes:
        layers: the description of each layer.
        dtype: the dtype of the products.
        torch_too: True if a product is left to torch where torch is expected to be faster.
        multiply_adds: the multiply-adds of one row.
        sections: the sections that have run, by their first layer and their end.
    """

    layers: tuple[LayerSpec, ...]
    dtype: torch.dtype
    torch_too: bool
    multiply_adds: int
    sections: dict[tuple[int, int], Section] = field(default_factory=dict, repr=False)

    @property
    def activations(self) -> tuple[Activation, ...]:
        return tuple(layer.activation for layer in self.layers)

    @functools.cached_property
    def drops(self) -> bool:
        """True if any layer has active Dropout."""
        return any(layer.dropout for layer in self.layers)

    def choose(self, device: Device) -> Choose:
        """The choice of a tile, or of torch, for the path's problems on a device."""
        return functools.partial(choose_tile, device=device, torch_too=self.torch_too)

    def section(self, first: int, end: int) -> Section:
        """The section of the layers first <= i < end."""
        section = self.sections.get((first, end))
        if section is None:
            section = self.sections[first, end] = Section(self, first, end)
        return section


@functools.lru_cache(maxsize=1024)
def layer_path(
    widths: tuple[int, ...],
    activations: tuple[Activation, ...],
    parameters: tuple[Parameters, ...],
    dtype: torch.dtype,
    precision: str,
    torch_too: bool,
    dropouts: tuple[float, ...],
) -> LayerPath:
    """The layer path for these layers; always the same object for the same arguments.

    Args:
        parameters: the dtypes and strides of each layer's parameters, as `parameters_of` gives them.
        dropouts: for each layer, the probability of its Dropout; 0 if it has none.
    """
    drops = dropouts_of(dropouts)
    layers = [
        LayerSpec(index, below, activation, dtype, precision, k, n, stored, dropout, dropout_below)
        for index, (below, activation, (k, n), stored, dropout, dropout_below) in enumerate(
            zip((IDENTITY, *activations), activations, itertools.pairwise(widths), parameters, drops, (None, *drops))
        )
    ]
    return LayerPath(tuple(layers), dtype, torch_too, sum(map(operator.mul, widths, widths[1:])))


# The random seed of a call, for all layers with Dropout. `explain` shows it as a step.
SEED = Step("seed", "all layers", "all", {}, (), lambda: None, Work(0, SEED_BYTES))


def room(rows: int, width: int) -> int:
    """The number of elements of (rows, width), rounded up so that the next tensor in the same buffer is aligned."""
    return -(-rows * width // 64) * 64


class Section:
    """A range of a path's layers, with the schedules that were written for it.

    Attributes:
        layers: the layers of the section.
        is_last: True if the section's output is the network's output.
    """

    def __init__(self, path: LayerPath, first: int, end: int) -> None:
        self.path = path
        self.layers = path.layers[first:end]
        self.is_last = end == len(path.layers)
        self.dtype = path.dtype
        self.cast = [spec.parameters.weight != path.dtype for spec in self.layers]
        self.cache = Cache()

    @functools.cached_property
    def strides(self) -> list[tuple[int, ...]]:
        """The strides of the weights that the kernels read, after a cast if there is one."""
        return [
            (spec.width_in, 1) if cast else spec.parameters.weight_stride for spec, cast in zip(self.layers, self.cast)
        ]

    # ------------------------------------------------------------ what is kept

    @functools.cached_property
    def keeps_output(self) -> bool:
        """True if backward reads the network's output, to compute the derivative of the last activation from it."""
        last = self.layers[-1]
        return self.is_last and last.activation is not IDENTITY and not last.keeps_z

    @functools.cached_property
    def hands_z(self) -> bool:
        """True if the edge to the next section is z, a tensor besides h."""
        return not self.is_last and self.layers[-1].keeps_z

    def kept(self) -> list[tuple[LayerSpec, bool]]:
        """The layers that save a tensor within the section, with True if that tensor is z, False if it is h."""
        inner = [(spec, spec.keeps_z) for spec in self.layers[:-1]]
        last = self.layers[-1]
        return inner + ([(last, True)] if self.is_last and last.keeps_z else [])

    def kept_shapes(self, rows: int) -> list[tuple[int, ...]]:
        """The shapes of the tensors that a forward saves besides x, y and the weights: one tensor or none."""
        widths = [spec.width_out for spec, _ in self.kept()]
        return [(sum(room(rows, width) for width in widths[:-1]) + rows * widths[-1],)] if widths else []

    def _place_kept(self, writer: Writer) -> None:
        """Name the parts of the buffer "kept"."""
        start = 0
        for spec, is_z in self.kept():
            name = f"{'z' if is_z else 'h'}[{spec.index}]"
            writer.part(name, "kept", start, writer.rows, spec.width_out)
            start += room(writer.rows, spec.width_out)

    # ------------------------------------------------------------ forward

    def forward(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        keep: bool,
        seed: Tensor | None,
    ) -> list[Any]:
        """[y, z, kept, casts …] for x of the path's dtype.

        z is given only if it is the edge. With `keep`, kept is the buffer of the tensors that backward reads besides x,
        y and the weights. casts are the weights in the path's dtype, for those that have another one. Anything that
        does not exist is None.
        """
        tensors = (x, seed, *weights, *biases)
        pointers, aligned = read(tensors)
        key = (keep, aligned, x.shape, x.stride(), x.get_device())
        schedule = self.cache.get(key)
        if schedule is None:
            given = named({"x": x, "seed": seed}, weights, biases, self.layers[0].index)
            choose = self.path.choose(devices.device_of(x))
            schedule = self.cache[key] = self.write_forward(given, x.shape[0], keep, choose)
        return schedule.run(tensors, pointers)

    def write_forward(self, given: Mapping[str, Tensor | None], rows: int, keep: bool, choose: Choose) -> Schedule:
        """Write the steps of the forward: z = h W^T + b and h = a(z), layer after layer."""
        writer = Writer(given, self.dtype, rows)
        if keep and (shapes := self.kept_shapes(rows)):
            writer.allocate("kept", *shapes[0])
            self._place_kept(writer)
        casts = [f"cast[{spec.index}]" if cast else None for spec, cast in zip(self.layers, self.cast)]
        for spec, cast in zip(self.layers, casts):
            if cast:
                add_cast(spec, writer, cast)
        last = self.layers[-1]
        writer.allocate("y", rows, last.width_out)
        if keep and self.hands_z:
            writer.allocate(f"z[{last.index}]", rows, last.width_out)
        below = "x"
        for place, (spec, cast) in enumerate(zip(self.layers, casts)):
            h = "y" if spec is last else f"h[{spec.index}]"
            if writer.has(h) is None:  # outputs that are not saved alternate between two buffers
                writer.share(h, f"h {place % 2}", rows, spec.width_out)
            z = writer.has(f"z[{spec.index}]") if keep else None
            add_forward(spec, writer, below, cast or f"weight[{spec.index}]", h, z, choose)
            below = h
        edge = f"z[{last.index}]" if keep and self.hands_z else None
        return writer.finish("y", edge, writer.has("kept") if keep else None, *casts)

    # ------------------------------------------------------------ backward

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        y: Tensor | None,
        kept: Tensor | None,
        weights: Sequence[Tensor | None],
        needs_x: bool,
        needs: Sequence[bool],
        seed: Tensor | None,
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """(dx, [dW …, db …]), with None for gradients that are not needed.

        Args:
            dy: the gradient of the network's output. In a section that is not the last, the gradient of its edge: dz.
            x: the edge from below.
            y: the output, if `keeps_output` is True.
            kept: the buffer that `forward` returned.
            weights: the weights, in the path's dtype and strides. The first may be None if dx is not needed.
        """
        tensors = (dy, x, y, kept, seed, *weights)
        pointers, aligned = read(tensors)
        key = (needs_x, *needs, aligned, x.shape, x.stride(), x.get_device(), dy.stride())
        schedule = self.cache.get(key)
        if schedule is None:
            given = named({"dy": dy, "x": x, "y": y, "kept": kept, "seed": seed}, weights, first=self.layers[0].index)
            choose = self.path.choose(devices.device_of(x))
            schedule = self.cache[key] = self.write_backward(given, x.shape[0], needs_x, needs, choose)
        dx, *gradients = schedule.run(tensors, pointers)
        return dx, gradients

    def write_backward(
        self, given: Mapping[str, Tensor | None], rows: int, needs_x: bool, needs: Sequence[bool], choose: Choose
    ) -> Schedule:
        """Write the steps of the backward, from the last layer down: dz of the layer below, then dW and db."""
        writer = Writer(given, self.dtype, rows)
        if self.kept_shapes(rows):
            self._place_kept(writer)
        count, last = len(self.layers), self.layers[-1]
        dz = "dy"
        if self.is_last and (last.activation is not IDENTITY or last.dropout is not None):
            own = None if last.activation is IDENTITY else writer.has(f"z[{last.index}]") or "y"
            dz = writer.share(f"dz[{last.index}]", f"dz {last.index % 2}", rows, last.width_out)
            add_output_gradient(last, writer, "dy", own, dz, choose)
        gradients: list[str | None] = [None] * (2 * count)
        for place in reversed(range(count)):
            spec = self.layers[place]
            needs_weight, needs_bias = needs[place], needs[count + place]
            below = self.layers[place - 1] if place else None
            h = "x"
            if below is not None:
                h = f"{'z' if below.keeps_z else 'h'}[{below.index}]"
            into = None
            if needs_x or any(needs[:place]) or any(needs[count : count + place]):
                if below is None:
                    into = writer.allocate("dx", rows, spec.width_in)
                else:  # dz alternates between two buffers
                    into = writer.share(f"dz[{below.index}]", f"dz {below.index % 2}", rows, spec.width_in)
                saved, rebuilt = None if spec.below is IDENTITY else h, None
                if needs_weight and spec.below_keeps_z:
                    h = rebuilt = writer.share(f"rebuilt[{spec.index}]", "rebuilt", rows, spec.width_in)
                add_dgrad(spec, writer, dz, f"weight[{spec.index}]", saved, into, rebuilt, choose)
            if needs_weight or needs_bias:
                if needs_weight:
                    gradients[place] = writer.allocate(
                        f"dw[{spec.index}]", spec.width_out, spec.width_in, dtype=spec.parameters.weight
                    )
                if needs_bias:
                    gradients[count + place] = writer.allocate(
                        f"db[{spec.index}]", spec.width_out, dtype=spec.parameters.bias
                    )
                dw, db = gradients[place], gradients[count + place]
                add_wgrad(spec, writer, dz, h, dw, db, choose)
            if into is None:
                break
            dz = into
        return writer.finish(writer.has("dx") if needs_x else None, *gradients)
