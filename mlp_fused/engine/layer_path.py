"""The layer path: the schedules of neighbouring layers, forward and backward, a kernel for each product.

A section is a range of a network's layers. Within it, one tensor a layer is kept for backward: the pre-activation z, or
the output h where the derivative can be read off it. What a section hands to the next one is its edge: that same
tensor, whose gradient by agreement is dz, so that a layer's dgrad ends in the derivative of the layer below, whichever
section that is in. Users never see an edge.
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
from ..kernels.dropout import SEED_BYTES, Dropout
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
        layers: what they are.
        dtype: of their products.
        torch_too: whether a product is left to torch where that is expected to be faster.
        multiply_adds: of a row.
        sections: the ranges of layers that have run, by their first layer and their end.
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
        """True if any layer drops."""
        return any(layer.dropout for layer in self.layers)

    def choose(self, device: Device) -> Choose:
        """The choice of a tile, or of torch, for the path's problems on a device."""
        return functools.partial(choose_tile, device=device, torch_too=self.torch_too)

    def section(self, first: int, end: int) -> Section:
        """The layers from `first` on, up to but not `end`."""
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
    """The one path for such layers.

    Args:
        parameters: each layer's, as `parameters_of` gives them.
        dropouts: the probability of each layer's Dropout, 0 where it has none.
    """
    drops = [Dropout(1.0 - p, index) if p else None for index, p in enumerate(dropouts)]
    layers = [
        LayerSpec(index, below, activation, dtype, precision, k, n, stored, dropout, dropout_below)
        for index, (below, activation, (k, n), stored, dropout, dropout_below) in enumerate(
            zip((IDENTITY, *activations), activations, itertools.pairwise(widths), parameters, drops, (None, *drops))
        )
    ]
    return LayerPath(tuple(layers), dtype, torch_too, sum(map(operator.mul, widths, widths[1:])))


# One random seed a call, of all layers that drop.
SEED = Step("seed", "all layers", "all", {}, (), lambda: None, Work(0, SEED_BYTES))


def room(rows: int, width: int) -> int:
    """Elements for (rows, width), so that what follows is aligned as an allocation's beginning is."""
    return -(-rows * width // 64) * 64


class Section:
    """A range of a path's layers, with the schedules that were written for it.

    Attributes:
        layers: those layers.
        is_last: whether the section's output is the network's.
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
        """The strides of the weights as the kernels read them."""
        return [
            (spec.width_in, 1) if cast else spec.parameters.weight_stride for spec, cast in zip(self.layers, self.cast)
        ]

    # ------------------------------------------------------------ what is kept

    @functools.cached_property
    def keeps_output(self) -> bool:
        """True if backward reads the network's output itself: the last derivative is read off it."""
        last = self.layers[-1]
        return self.is_last and last.activation is not IDENTITY and not last.keeps_z

    @functools.cached_property
    def hands_z(self) -> bool:
        """True if the edge to the next section is z, beside h."""
        return not self.is_last and self.layers[-1].keeps_z

    def kept(self) -> list[tuple[LayerSpec, bool]]:
        """The layers that keep a tensor within the section, and whether it is z."""
        inner = [(spec, spec.keeps_z) for spec in self.layers[:-1]]
        last = self.layers[-1]
        return inner + ([(last, True)] if self.is_last and last.keeps_z else [])

    def kept_shapes(self, rows: int) -> list[tuple[int, ...]]:
        """The shapes of what a forward keeps besides x, y and the weights: one tensor or none."""
        widths = [spec.width_out for spec, _ in self.kept()]
        return [(sum(room(rows, width) for width in widths[:-1]) + rows * widths[-1],)] if widths else []

    def _place_kept(self, writer: Writer) -> None:
        """The parts of "kept", by their names."""
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

        z is the edge where that is z. kept is what backward reads besides x, y and the weights, with `keep`; casts are
        the weights as the kernels read them, where they are of another dtype. None stands for what there is not.
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
        """The forward's steps: z = h W^T + b and h = a(z), layer after layer."""
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
            if writer.has(h) is None:  # layers that are not kept take two places in turn
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
        """dx and the gradients of the weights and then of the biases, those that are needed.

        Args:
            dy: the gradient of the network's output; of an inner section, the edge's: dz.
            x: the edge from below.
            y: the output, where `keeps_output` says so.
            kept: as `forward` gave it.
            weights: of the path's dtype and strides; the first may be None where dx is not needed.
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
        """The backward's steps: from dy down, dz of the layer below, then dW and db of the layer itself."""
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
                else:  # dz takes two places in turn
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
