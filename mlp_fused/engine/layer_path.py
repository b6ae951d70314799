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

import torch
from torch import Tensor

from ..kernels.activation import Activation
from ..kernels.activations import IDENTITY
from ..kernels.devices import Device
from ..kernels.dropout import SEED_BYTES, layer_dropouts
from .layer_steps import (
    Choose,
    LayerSpec,
    Parameters,
    add_activation,
    add_cast,
    add_dgrad,
    add_forward,
    add_output_gradient,
    add_wgrad,
    choose_tile,
    drop_unread,
)
from .schedule import Schedule, Step, Work, Writer
from .section import Section, parameter_names

__all__ = ["IDENTITY", "SEED", "LayerPath", "LayerSection", "layer_path"]


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
    sections: dict[tuple[int, int], LayerSection] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def drops(self) -> bool:
        """True if any layer has active Dropout."""
        return any(layer.dropout for layer in self.layers)

    def choose(self, device: Device) -> Choose:
        """A function that chooses a tile, or torch, for a problem of this path on a device."""
        return functools.partial(choose_tile, device=device, torch_too=self.torch_too)

    def section(self, first: int, end: int) -> LayerSection:
        """The section of the layers first <= i < end."""
        section = self.sections.get((first, end))
        if section is None:
            section = self.sections[first, end] = LayerSection(self, first, end)
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
    """The layer path for these layers, cached by its arguments.

    Args:
        parameters: the dtypes and strides of each layer's parameters, as `describe_parameters` gives them.
        dropouts: for each layer, the probability of its Dropout; 0 if it has none.
    """
    drops = layer_dropouts(dropouts)
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


class LayerSection(Section):
    """A range of a path's layers.

    Attributes:
        layers: the layers of the section.
        cast: for each layer, True if its weight is cast to the path's dtype.
    """

    takes_unread = False

    def __init__(self, path: LayerPath, first: int, end: int) -> None:
        self.path = path
        self.layers = path.layers[first:end]
        self.is_last = end == len(path.layers)
        self.dtype = path.dtype
        self.below, self.dropout_below = self.layers[0].below, self.layers[0].dropout_below
        self.activations = [spec.activation for spec in self.layers]
        self.dropouts = [spec.dropout for spec in self.layers]
        self.widths = [self.layers[0].width_in, *(spec.width_out for spec in self.layers)]
        self.parameters = parameter_names(first, end)
        self.strides = [spec.parameters.weight_stride for spec in self.layers]
        self.strides += [(spec.parameters.bias_stride,) for spec in self.layers]
        self.cast = [spec.parameters.weight != path.dtype for spec in self.layers]
        self.cache, self.known = {}, {}

    def kept(self) -> list[tuple[LayerSpec, bool]]:
        """The layers that save a tensor within the section, with True if that tensor is z, False if it is h."""
        inner = [(spec, spec.saves_z) for spec in self.layers[:-1]]
        last = self.layers[-1]
        return inner + ([(last, True)] if self.is_last and last.saves_z else [])

    def saved_shapes(self, rows: int, needs: Sequence[bool]) -> dict[str, tuple[int, ...]]:
        needs_x, needs_weight, *_ = needs
        shapes: dict[str, tuple[int, ...]] = {}
        # "x" is the edge from below. A single layer needs it for dW, and for the derivative of the activation below. If
        # the layer multiplies dy by the derivative of its own activation, second derivatives need it too.
        last = self.layers[-1]
        differentiates = self.is_last and last.activation is not IDENTITY
        if len(self.layers) > 1 or needs_weight or (needs_x and self.below is not IDENTITY) or differentiates:
            shapes["x"] = (rows, self.widths[0])
        if widths := [spec.width_out for spec, _ in self.kept()]:
            shapes["kept"] = (sum(room(rows, width) for width in widths[:-1]) + rows * widths[-1],)
        if differentiates and not last.saves_z:  # its derivative is computed from y
            shapes["y"] = (rows, self.widths[-1])
        if any(spec.dropout or spec.dropout_below for spec in self.layers):
            shapes["seed"] = (1,)
        for spec, cast in zip(self.layers, self.cast):
            if cast and (needs_x or spec is not self.layers[0]):
                shapes[f"cast[{spec.index}]"] = (spec.width_out, spec.width_in)
        return shapes

    def parameters_read(self, needs: Sequence[bool]) -> Sequence[int]:
        return [position for position, cast in enumerate(self.cast) if not cast and (position or needs[0])]

    def _name_kept_parts(self, writer: Writer) -> None:
        """Name the parts of the buffer "kept"."""
        start = 0
        for spec, is_z in self.kept():
            name = f"{'z' if is_z else 'h'}[{spec.index}]"
            writer.part(name, "kept", start, writer.rows, spec.width_out)
            start += room(writer.rows, spec.width_out)

    def write_forward(
        self, given: Mapping[str, Tensor | None], rows: int, needs: tuple[bool, ...] | None, device: Device
    ) -> Schedule:
        """Write the steps of the forward: z = h Wᵀ + b and h = a(z), layer after layer."""
        writer, choose = Writer(given, self.dtype, rows), self.path.choose(device)
        shapes = self.saved_shapes(rows, needs) if needs else {}
        if "kept" in shapes:
            writer.allocate("kept", *shapes["kept"])
            self._name_kept_parts(writer)
        casts = [f"cast[{spec.index}]" if cast else None for spec, cast in zip(self.layers, self.cast)]
        for spec, cast in zip(self.layers, casts):
            if cast:
                add_cast(spec, writer, cast)
        last = self.layers[-1]
        writer.allocate("y", rows, last.width_out)
        edge = None  # the edge to the next section, if it is not y
        if needs and not self.is_last and last.saves_z:
            edge = writer.allocate(f"z[{last.index}]", rows, last.width_out)
        below = "h"
        for position, (spec, cast) in enumerate(zip(self.layers, casts)):
            h = "y" if spec is last else f"h[{spec.index}]"
            if writer.find(h) is None:  # outputs that are not saved alternate between two buffers
                writer.share(h, f"h {position % 2}", rows, spec.width_out)
            z = writer.find(f"z[{spec.index}]")
            add_forward(spec, writer, below, cast or f"weight[{spec.index}]", h, z, choose)
            below = h
        drop_unread(writer, "y", edge, *shapes)
        return writer.finish("y", edge, *shapes)

    def write_backward(
        self, given: Mapping[str, Tensor | None], rows: int, needs: tuple[bool, ...], device: Device
    ) -> Schedule:
        """Write the steps of the backward, from the last layer down: dz of the layer below, then dW and db."""
        writer, choose = Writer(given, self.dtype, rows), self.path.choose(device)
        self._name_kept_parts(writer)
        count, last = len(self.layers), self.layers[-1]
        needs_x, *needs_parameters = needs
        dz = "dy"
        if self.is_last and (last.activation is not IDENTITY or last.dropout is not None):
            last_saved = None if last.activation is IDENTITY else writer.find(f"z[{last.index}]") or "y"
            dz = writer.share(f"dz[{last.index}]", f"dz {last.index % 2}", rows, last.width_out)
            add_output_gradient(last, writer, "dy", last_saved, dz, choose)
        gradients: list[str | None] = [None] * (2 * count)
        for position in reversed(range(count)):
            spec = self.layers[position]
            needs_weight, needs_bias = needs_parameters[position], needs_parameters[count + position]
            below = self.layers[position - 1] if position else None
            h = "x"
            if below is not None:
                h = f"{'z' if below.saves_z else 'h'}[{below.index}]"
            into = None
            if any(needs[: 1 + position]) or any(needs_parameters[count : count + position]):
                if below is None:
                    into = writer.allocate("dx", rows, spec.width_in)
                else:  # dz alternates between two buffers
                    into = writer.share(f"dz[{below.index}]", f"dz {below.index % 2}", rows, spec.width_in)
                saved, rebuilt = None if spec.below is IDENTITY else h, None
                if needs_weight and spec.below_saves_z:
                    h = rebuilt = writer.share(f"rebuilt[{spec.index}]", "rebuilt", rows, spec.width_in)
                weight = writer.find(f"cast[{spec.index}]") or f"weight[{spec.index}]"
                add_dgrad(spec, writer, dz, weight, saved, into, rebuilt, choose)
            if needs_weight or needs_bias:
                if into is None and needs_weight and below is not None and below.saves_z:  # no dgrad rebuilds h
                    z, h = h, writer.share(f"rebuilt[{spec.index}]", "rebuilt", rows, spec.width_in)
                    add_activation(below, writer, z, h, choose)
                if needs_weight:
                    gradients[position] = writer.allocate(
                        f"dw[{spec.index}]", spec.width_out, spec.width_in, dtype=spec.parameters.weight
                    )
                if needs_bias:
                    gradients[count + position] = writer.allocate(
                        f"db[{spec.index}]", spec.width_out, dtype=spec.parameters.bias
                    )
                dw, db = gradients[position], gradients[count + position]
                add_wgrad(spec, writer, dz, h, dw, db, choose)
            if into is None:
                break
            dz = into
        drop_unread(writer, "dx")
        return writer.finish(writer.find("dx") if needs_x else None, *gradients)
