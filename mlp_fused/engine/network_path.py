"""The network path: the schedules of a narrow network whose layers run in one kernel."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels import network
from ..kernels.network import Gradients, Network
from ..kernels.network_backward import network_dgrad, network_wgrad, network_wgrad_sums
from ..kernels.network_forward import network_forward
from ..kernels.network_one_pass import network_one_pass, network_one_pass_sums
from ..kernels.partial_sums import Partial
from ..kernels.tile_config import TileConfig
from .layer_steps import sum_step
from .schedule import Cache, Schedule, Step, Work, Writer, named, read
from .torch_products import zeros_by_torch

__all__ = ["Formulation", "NetworkPath"]

# How the network path trains. recompute: one backward kernel runs the forward again. stored: the forward keeps one
# tensor of each hidden layer. replay: x alone is kept, and backward begins with the forward that stores.
Formulation = Literal["recompute", "stored", "replay"]


@dataclass(frozen=True, eq=False)
class NetworkPath:
    """The network path for some layers on a device: its tiles, and how it trains, with the reason.

    Attributes:
        formulation: how it trains; None for inference only.
        backward_tile: of the backward in one pass, or of the kernel that takes dz down the layers.
        groups: the layers (low, high) of each launch of one pass over stored tensors, the highest first; without any,
            one launch takes dz down the layers and another one sums the weight gradients.
    """

    network: Network
    forward_tile: TileConfig
    formulation: Formulation | None
    reason: str
    backward_tile: TileConfig | None
    wgrad_tile: TileConfig
    groups: tuple[tuple[int, int], ...] = ()
    cache: Cache = field(default_factory=Cache, repr=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def activations(self) -> tuple[Any, ...]:
        return self.network.activations

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

    @property
    def stores(self) -> bool:
        """True if the forward keeps more than x."""
        return self.formulation == "stored"

    @property
    def keeps_output(self) -> bool:
        """True if backward reads the network's output itself."""
        return self.stores and self.network.activates_output and not self.network.keeps_z[-1]

    def kept_shapes(self, rows: int) -> list[tuple[int, ...]]:
        """The shapes of what a forward keeps besides x and y, all of the network's dtype."""
        net = self.network
        if not self.stores:
            return []
        hidden = [(rows * net.starts[-1],)] if net.layers > 1 else []
        return hidden + ([(rows, net.widths[-1])] if net.keeps_z[-1] else [])

    # ------------------------------------------------------------ forward

    def forward(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], keep: bool
    ) -> tuple[Tensor, list[Tensor | None]]:
        """y, and with `keep` what is kept of the hidden layers and the last pre-activation, None where there is not."""
        tensors = (x, *weights, *biases)
        pointers, aligned = read(tensors)
        key = (keep, aligned, x.shape, x.stride(), x.dtype, x.get_device())
        schedule = self.cache.get(key)
        if schedule is None:
            given = named({"x": x}, weights, biases)
            schedule = self.cache[key] = self.write_forward(given, x.shape[0], keep)
        y, *kept = schedule.run(tensors, pointers)
        return y, kept

    def write_forward(self, given: Mapping[str, Tensor | None], rows: int, keep: bool) -> Schedule:
        """One step: all layers."""
        writer = Writer(given, self.dtype, rows)
        step = self._forward_step(writer, "network forward", keep)
        if rows:
            writer.steps.append(step)
        return writer.finish("y", *((step.operands["kept"], step.operands["z"]) if keep else ()))

    def _forward_step(self, writer: Writer, kind: str, keep: bool) -> Step:
        net, rows, tile = self.network, writer.rows, self.forward_tile
        y = writer.allocate("y", rows, net.widths[-1])
        kept = writer.allocate("kept", rows * net.starts[-1]) if keep and net.layers > 1 else None
        z = writer.allocate("z", rows, net.widths[-1]) if keep and net.keeps_z[-1] else None

        run = partial(network_forward, network=net, tile=tile)

        weights, biases = _parameters(writer, net.layers)
        operands = {"x": "x", "y": y, "weights": weights, "biases": biases, "kept": kept, "z": z, "h": None}
        elements = self._ends(rows) + self._parameters_elements(writer)
        elements += (rows * net.starts[-1]) * (kept is not None) + rows * net.widths[-1] * (z is not None)
        return self._step(kind, operands, ("y", "kept", "z"), run, self._flops(rows), elements, tile)

    # ------------------------------------------------------------ backward

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        kept: Tensor | None,
        own: Tensor | None,
        parameters: Sequence[Tensor | None],
        needs_x: bool,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """dx, and the gradients of the weights and then of the biases, those that are needed.

        Args:
            kept: of the hidden layers, and `own` of the last one, z or y: where the forward stores them.
            parameters: the weights, then the biases, as the user has them.
        """
        tensors = (dy, x, kept, own, *parameters)
        pointers, aligned = read(tensors)
        # Hooks on saved tensors may have given the parameters other strides, too.
        strides = [tensor.stride() for tensor in (x, dy, *parameters) if tensor is not None]
        key = (needs_x, *needs, aligned, x.shape, x.dtype, x.get_device(), *strides)
        schedule = self.cache.get(key)
        if schedule is None:
            count = len(parameters) // 2
            given = named({"dy": dy, "x": x, "kept": kept, "own": own}, parameters[:count], parameters[count:])
            schedule = self.cache[key] = self.write_backward(given, x.shape[0], needs_x, needs)
        dx, *gradients = schedule.run(tensors, pointers)
        return dx, gradients

    def write_backward(
        self, given: Mapping[str, Tensor | None], rows: int, needs_x: bool, needs: Sequence[bool]
    ) -> Schedule:
        """One pass, or a step for every dz and one for all dW and db. The last step adds partial sums."""
        writer = Writer(given, self.dtype, rows)
        path = self._with_strides(given)
        net, layers = path.network, self.network.layers
        wanted = network.gradients_of(net.widths, tuple(needs[:layers]), tuple(needs[layers:]), needs_x)
        x = given["x"]
        assert x is not None
        dx = writer.allocate("dx", rows, net.widths[0], dtype=x.dtype) if needs_x else None
        gradients: list[str | None] = []
        for place, need in enumerate(needs):
            name = f"weight[{place}]" if place < layers else f"bias[{place - layers}]"
            parameter = given[name]
            if not need or parameter is None:
                gradients.append(None)
                continue
            gradients.append(writer.allocate(f"d {name}", *parameter.shape, dtype=parameter.dtype))
        by_layer = (name for pair in zip(gradients[:layers], gradients[layers:]) for name in pair)
        sums = tuple(name for name in by_layer if name is not None)
        if not rows:
            writer.steps += [
                Step("zeros", "network", self._label, {"total": total}, ("total",), zeros_by_torch) for total in sums
            ]
        elif self.formulation == "recompute":
            writer.steps += path._one_pass_steps(writer, dx, None, None, sums, wanted, ((0, layers),))
        else:
            kept, own = writer.has("kept"), writer.has("own")
            if self.formulation == "replay":
                writer.steps.append(path._forward_step(writer, "network again", keep=True))
                kept = writer.has("kept")
                own = (writer.has("z") or "y") if net.activates_output else None
            if self.groups:
                writer.steps += path._one_pass_steps(writer, dx, kept, own, sums, wanted, self.groups)
            else:
                writer.steps += path._stored_steps(writer, dx, kept, own, sums, wanted)
        return writer.finish(dx, *gradients)

    def _with_strides(self, given: Mapping[str, Tensor | None]) -> NetworkPath:
        """The path for parameters of these strides: hooks on saved tensors may have given them others."""
        net = self.network
        strides = []
        for place in range(net.layers):
            weight, bias = given[f"weight[{place}]"], given[f"bias[{place}]"]
            assert weight is not None
            strides.append((*weight.stride(), 0 if bias is None else bias.stride(0)))
        if tuple(strides) == net.strides:
            return self
        net = network.network_of(net.widths, tuple(strides), net.activations, net.dtype, net.precision)
        return NetworkPath(
            net, self.forward_tile, self.formulation, self.reason, self.backward_tile, self.wgrad_tile, self.groups
        )

    def _one_pass_steps(
        self,
        writer: Writer,
        dx: str | None,
        kept: str | None,
        own: str | None,
        sums: tuple[str, ...],
        wanted: Gradients,
        groups: Sequence[tuple[int, int]],
    ) -> list[Step]:
        net, tile, rows = self.network, self.backward_tile, writer.rows
        assert tile is not None
        lowest = wanted.lowest
        groups = [(max(low, lowest), high) for low, high in groups if high > lowest]
        if not groups:
            return []
        sums_of_all = network_one_pass_sums(rows, net, wanted, tile)
        weights, biases = _parameters(writer, net.layers)
        whole = _allocate_partial(writer, sums_of_all)
        operands = {"x": "x", "dy": "dy", "weights": weights, "biases": biases, "kept": kept, "own": own, "h": None}
        operands |= {"dz": writer.allocate("dz", rows * net.starts[-1]) if len(groups) > 1 else None}
        operands |= {"dx": dx, "partial": whole}
        recompute = self.formulation == "recompute"
        steps = []
        for low, high in groups:
            run = partial(network_one_pass, network=net, gradients=wanted, tile=tile, group=(low, high))
            # A layer's input is read where it is stored, dz of the highest layer, and written below the lowest one.
            columns = [*net.widths[:1], net.widths[-1]] if recompute else [*net.widths[low:high], net.widths[high]]
            columns += [net.widths[-1]] if own and high == net.layers else []
            columns += [net.widths[low]] if low > lowest or (dx and low == 0) else []
            elements = rows * sum(columns) + self._parameters_elements(writer, low, high)
            elements += sum(net.widths[i + 1] * net.widths[i] * wanted.weights[i] for i in range(low, high))
            elements += sum(net.widths[i + 1] * wanted.biases[i] for i in range(low, high))
            flops = self._flops(rows, low + (low == lowest and not (dx and low == 0)), high)
            flops += sum(self._flops(rows, i, i + 1) for i in range(low, high) if wanted.weights[i])
            if recompute:
                flops += self._flops(rows, end=net.layers - 1 + net.activates_output)
            kind = "network recompute" if recompute else "network one pass"
            steps.append(self._step(kind, operands, ("dx", "dz", "partial"), run, flops, elements, tile))
        return [*steps, *self._sum_steps(whole, sums, sums_of_all)]

    def _stored_steps(
        self,
        writer: Writer,
        dx: str | None,
        kept: str | None,
        own: str | None,
        sums: tuple[str, ...],
        wanted: Gradients,
    ) -> list[Step]:
        net, rows = self.network, writer.rows
        hidden, width_out = rows * net.starts[-1], net.widths[-1]
        dz = writer.allocate("dz", hidden) if kept else None
        last = writer.allocate("last", rows, width_out) if own else None
        steps = []
        if last or wanted.lowest + 1 < net.layers or dx:
            tile = self.backward_tile
            assert tile is not None

            run = partial(network_dgrad, network=net, gradients=wanted, tile=tile)

            weights, _ = _parameters(writer, net.layers)
            operands: dict[str, Any] = {"dy": "dy", "dx": dx, "weights": weights, "kept": kept, "own": own}
            operands |= {"dz": dz, "last": last}
            # dy and what was kept are read, every dz written, the last layer's where it is not dy.
            ends = rows * width_out * (1 + 2 * (own is not None))
            elements = ends + 2 * hidden + rows * net.widths[0] * (dx is not None) + self._parameters_elements(writer)
            flops = self._chain_flops(rows, wanted, dx)
            steps.append(self._step("network dgrad", operands, ("dx", "dz", "last"), run, flops, elements, tile))
        if sums:
            sums_of_all = network_wgrad_sums(rows, net, wanted, self.wgrad_tile)
            wgrad_tile = self.wgrad_tile

            run = partial(network_wgrad, network=net, gradients=wanted, tile=wgrad_tile)

            whole = _allocate_partial(writer, sums_of_all)
            operands = {"x": "x", "dy": last or "dy", "kept": kept, "dz": dz, "partial": whole}
            elements = self._ends(rows) + 2 * hidden + wanted.starts[-1]
            flops = self._sum_flops(rows, wanted)
            steps.append(self._step("network wgrad", operands, ("partial",), run, flops, elements, wgrad_tile))
            steps += self._sum_steps(whole, sums, sums_of_all)
        return steps

    # ------------------------------------------------------------ what the steps share

    def _step(
        self,
        kind: str,
        operands: Mapping[str, Any],
        writes: tuple[str, ...],
        run: Any,
        flops: int,
        elements: int,
        tile: TileConfig,
    ) -> Step:
        work = Work(flops, elements * self.dtype.itemsize)
        return Step(kind, "network", self._label, operands, writes, run, work, None, tile)

    def _sum_steps(self, whole: str, sums: tuple[str, ...], partial_sums: Partial) -> list[Step]:
        return [sum_step("network", self._label, whole, sums, partial_sums)] if sums else []

    @property
    def _label(self) -> str:
        return f"0-{self.network.layers - 1}: " + " -> ".join(map(str, self.network.widths))

    def _ends(self, rows: int) -> int:
        """Elements of x and y."""
        return rows * (self.network.widths[0] + self.network.widths[-1])

    def _parameters_elements(self, writer: Writer, low: int = 0, high: int | None = None) -> int:
        widths = list(itertools.pairwise(self.network.widths))
        biased = [writer.has(f"bias[{place}]") is not None for place in range(self.network.layers)]
        return sum(n * k + n * bias for (k, n), bias in list(zip(widths, biased))[low:high])

    def _flops(self, rows: int, start: int = 0, end: int | None = None) -> int:
        """FLOPs of the products of some layers, by default of all."""
        return sum(2 * rows * n * k for k, n in list(itertools.pairwise(self.network.widths))[start:end])

    def _chain_flops(self, rows: int, wanted: Gradients, dx: str | None) -> int:
        """FLOPs of dz from the output down to the lowest layer that a gradient is wanted of, and of dx."""
        return self._flops(rows, wanted.lowest + 1) + (self._flops(rows, 0, 1) if dx else 0)

    def _sum_flops(self, rows: int, wanted: Gradients) -> int:
        """FLOPs of the weight gradients that are wanted."""
        return sum(self._flops(rows, place, place + 1) for place, weight in enumerate(wanted.weights) if weight)


def _parameters(writer: Writer, layers: int) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """The names of the weights and of the biases."""
    return (
        tuple(writer.has(f"weight[{place}]") for place in range(layers)),
        tuple(writer.has(f"bias[{place}]") for place in range(layers)),
    )


def _allocate_partial(writer: Writer, sums: Partial) -> str:
    return writer.allocate("partial", sums.splits, sums.columns, dtype=sums.dtype)
