"""The network path: the schedules of a narrow network whose layers run in one kernel."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor

from ..kernels import network
from ..kernels.devices import Device
from ..kernels.dropout import Dropout
from ..kernels.network import Gradients, Network
from ..kernels.network_backward import network_dgrad, network_wgrad, network_wgrad_sums
from ..kernels.network_forward import network_forward
from ..kernels.network_one_pass import network_one_pass, network_one_pass_sums
from ..kernels.partial_sums import Partial
from ..kernels.tile_config import TileConfig
from .layer_steps import add_sums
from .schedule import Schedule, Writer
from .section import Section, parameter_names
from .tables import Choice
from .torch_products import zeros_by_torch

__all__ = ["Formulation", "NetworkPath"]

# The way the network path trains. recompute: one backward kernel runs the forward again. stored: the forward saves one
# tensor for each hidden layer. rerun: only x is saved, and backward first runs the forward of "stored".
Formulation = Literal["recompute", "stored", "rerun"]


SPLIT = {  # the explanation of a precision (see kernels/tile.py)
    "bf16x6": "; float32 is multiplied in three bf16 parts",
    "fp16x3": "; float32 is multiplied in two scaled fp16 parts",
    "fp16x1": "; tf32 is multiplied as scaled fp16",
}


@dataclass(eq=False)
class NetworkPath(Section):
    """The network path for some layers on a device: its tiles and its formulation of training, with the reason.

    Attributes:
        formulation: the way it trains; None for inference only.
        reason: the reason for the formulation.
        backward_tile: the tile of the backward in one pass, or of network_dgrad.
        groups: for the one pass over stored tensors, the layers (low, high) of each launch, the highest first. If it is
            empty, network_dgrad and network_wgrad run instead.
        dropouts: each layer's Dropout, None where nothing is dropped; empty if no layer has Dropout.
    """

    network: Network
    forward_tile: TileConfig
    formulation: Formulation | None
    reason: str
    backward_tile: TileConfig | None
    wgrad_tile: TileConfig
    groups: tuple[tuple[int, int], ...] = ()
    dropouts: tuple[Dropout | None, ...] = ()

    def __post_init__(self) -> None:
        net = self.network
        self.dtype, self.activations, self.widths = net.dtype, net.activations, net.widths
        self.parameters = parameter_names(0, net.layers)
        self.strides = [strides[:2] for strides in net.strides] + [strides[2:] for strides in net.strides]
        self.cache, self.known = {}, {}

    @property
    def explanation(self) -> str:
        """The reason for the network path and for this formulation."""
        how = {
            "recompute": "backward recomputes the forward in one pass: ",
            "stored": "the forward stores one tensor a hidden layer: ",
            "rerun": "backward begins with the forward again: ",
        }
        trains = f"; {how[self.formulation]}{self.reason}" if self.formulation else ""
        split = SPLIT.get(self.network.precision, "")
        return f"the weights fit on the chip{split}{trains}"

    @functools.cached_property
    def drops(self) -> bool:
        """True if any layer has active Dropout."""
        return any(self.network.drops)

    @property
    def keeps(self) -> tuple[float | None, ...] | None:
        """For each layer, the probability that an element is kept, None without Dropout; None if no layer has any."""
        if not self.drops:
            return None
        return tuple(None if dropout is None else dropout.keep for dropout in self.dropouts)

    @property
    def stores(self) -> bool:
        """True if the forward saves the tensors of hidden layers for backward."""
        return self.formulation == "stored"

    def saved_shapes(self, rows: int, needs: Sequence[bool] = ()) -> dict[str, tuple[int, ...]]:
        net = self.network
        shapes: dict[str, tuple[int, ...]] = {"x": (rows, net.widths[0])}
        if self.stores and net.layers > 1:
            shapes["kept"] = (rows * net.starts[-1],)
        if self.stores and (net.activates_output or net.saves_z[-1]):
            shapes["z" if net.saves_z[-1] else "y"] = (rows, net.widths[-1])
        if self.drops:
            shapes["seed"] = (1,)
        return shapes

    def parameters_read(self, needs: Sequence[bool]) -> range:
        layers = self.network.layers
        return range(0 if needs[0] else 1, layers) if self.stores else range(2 * layers)

    def write_forward(
        self, given: Mapping[str, Tensor | None], rows: int, needs: tuple[bool, ...] | None, device: Device
    ) -> Schedule:
        """Write the single step of the forward, which computes all layers."""
        writer = Writer(given, self.dtype, rows)
        self._add_forward(writer, "network forward", needs is not None and self.stores)
        return writer.finish("y", None, *(self.saved_shapes(rows) if needs else ()))

    def _add_forward(self, writer: Writer, kind: str, keep: bool) -> tuple[str | None, str | None]:
        """Add the forward. Returns the names of the hidden layers' saved tensors and of the last pre-activation."""
        net, rows = self.network, writer.rows
        y = writer.allocate("y", rows, net.widths[-1])
        kept = writer.allocate("kept", rows * net.starts[-1]) if keep and net.layers > 1 else None
        z = writer.allocate("z", rows, net.widths[-1]) if keep and net.saves_z[-1] else None
        weights, biases = self._parameters(writer)
        operands = {"x": "x", "y": y, "weights": weights, "biases": biases, "kept": kept, "z": z, "h": None}
        if rows:
            writes, flops = ("y", "kept", "z"), self._flops(rows)
            self._add(writer, kind, network_forward, self.forward_tile, operands, writes, flops)
        return kept, z

    def write_backward(
        self, given: Mapping[str, Tensor | None], rows: int, needs: tuple[bool, ...], device: Device
    ) -> Schedule:
        """Write the backward: one pass; or one step for all dz and one for all dW and db. A last step adds the sums."""
        writer = Writer(given, self.dtype, rows)
        net, layers = self.network, self.network.layers
        wanted = network.make_gradients(net.widths, needs[1 : 1 + layers], needs[1 + layers :], needs[0])
        dx, *gradients = [
            writer.allocate(f"d {name}", *tensor.shape, dtype=tensor.dtype)
            if need and (tensor := given[name]) is not None
            else None
            for name, need in zip(("x", *self.parameters), needs)
        ]
        by_layer = (name for pair in zip(gradients[:layers], gradients[layers:]) for name in pair)
        totals = tuple(name for name in by_layer if name is not None)
        sums: Partial | None = None
        if not rows:
            for total in totals:
                writer.add("zeros", self, {"total": total}, ("total",), zeros_by_torch)
        elif self.formulation == "recompute":
            sums = self._add_recompute(writer, dx, wanted)
        else:
            kept, last_saved = writer.find("kept"), writer.find("z") or writer.find("y")
            if self.formulation == "rerun":
                kept, z = self._add_forward(writer, "network again", keep=True)
                last_saved = (z or "y") if net.activates_output else None
            add = self._add_one_pass if self.groups else self._add_stored
            sums = add(writer, dx, kept, last_saved, wanted)
        if sums is not None and totals:
            add_sums(self, writer, "partial", totals, sums)
        return writer.finish(dx, *gradients)

    def _add_recompute(self, writer: Writer, dx: str | None, wanted: Gradients) -> Partial:
        """Add one kernel that recomputes the forward and computes every dz, dW and db, the last two as partial sums."""
        net, tile, rows = self.network, self.backward_tile, writer.rows
        assert tile is not None
        weights, biases = self._parameters(writer)
        operands = {"x": "x", "dy": "dy", "dx": dx, "weights": weights, "biases": biases}
        sums = network_one_pass_sums(rows, net, wanted, tile)
        operands |= {"kept": None, "last_saved": None, "dz": None, "h": None, "partial": _allocate(writer, sums)}
        recomputed = self._flops(rows, end=net.layers - 1 + net.activates_output)
        flops = recomputed + self._dgrad_flops(rows, wanted, dx) + self._wgrad_flops(rows, wanted)
        kernel, moved = partial(network_one_pass, gradients=wanted), {**operands, "partial": self._gradients()}
        self._add(writer, "network recompute", kernel, tile, operands, ("dx", "partial"), flops, moved)
        return sums

    def _add_one_pass(
        self, writer: Writer, dx: str | None, kept: str | None, last_saved: str | None, wanted: Gradients
    ) -> Partial | None:
        """Add one launch for each group of layers, which computes dz, and partial sums of dW and db."""
        net, rows, tile, lowest = self.network, writer.rows, self.backward_tile, wanted.lowest
        assert tile is not None
        groups = [(max(low, lowest), high) for low, high in self.groups if high > lowest]
        if not groups:
            return None
        sums = network_one_pass_sums(rows, net, wanted, tile)
        whole = _allocate(writer, sums)
        dz = writer.allocate("dz", rows * net.starts[-1]) if len(groups) > 1 else None
        weights = self._parameters(writer)[0]

        def hidden(tensor: str | None, layer: int) -> str:
            """The name of a layer's part of the saved tensors, or of dz."""
            assert tensor is not None
            width = net.widths[layer + 1]
            return writer.part(f"{tensor}[{layer}]", tensor, rows * net.starts[layer], rows, width)

        for low, high in groups:
            layers, top = range(low, high), high == net.layers
            goes_below = low > lowest or (low == 0 and dx is not None)
            operands: dict[str, Any] = {"x": "x", "dy": "dy", "dx": None if low else dx, "weights": weights}
            operands |= {"biases": (None,) * net.layers, "kept": kept, "last_saved": last_saved if top else None}
            operands |= {"dz": dz, "h": None, "partial": whole}
            moved = {
                "inputs": tuple(hidden(kept, i - 1) if i else "x" for i in layers),
                "dz": "dy" if top else hidden(dz, high - 1),
                "last_saved": operands["last_saved"],
                "weights": weights[low if goes_below else low + 1 : high],
                "dx": hidden(dz, low - 1) if low > lowest else operands["dx"],
                "partial": self._gradients(low, high),
            }
            flops = self._flops(rows, low if goes_below else low + 1, high)
            flops += sum(self._flops(rows, i, i + 1) for i in layers if wanted.weights[i])
            kernel = partial(network_one_pass, gradients=wanted, group=(low, high))
            writes = ("dx", "dz", "partial")
            self._add(writer, "network one pass", kernel, tile, operands, writes, flops, moved)
        return sums

    def _add_stored(
        self, writer: Writer, dx: str | None, kept: str | None, last_saved: str | None, wanted: Gradients
    ) -> Partial | None:
        """Add one kernel for all dz, and one kernel for partial sums of all dW and db, if any are wanted."""
        net, rows, tile = self.network, writer.rows, self.backward_tile
        dz = writer.allocate("dz", rows * net.starts[-1]) if kept else None
        last_dz = writer.allocate("last_dz", rows, net.widths[-1]) if net.differentiates_output else None
        if last_dz or wanted.lowest + 1 < net.layers or dx:
            assert tile is not None
            weights, _ = self._parameters(writer)
            operands: dict[str, Any] = {"dy": "dy", "dx": dx, "weights": weights, "kept": kept}
            operands |= {"last_saved": last_saved, "dz": dz, "last_dz": last_dz}
            moved = {**operands, "weights": weights if dx else weights[1:]}
            kernel, writes = partial(network_dgrad, gradients=wanted), ("dx", "dz", "last_dz")
            flops = self._dgrad_flops(rows, wanted, dx)
            self._add(writer, "network dgrad", kernel, tile, operands, writes, flops, moved)
        if not any((*wanted.weights, *wanted.biases)):
            return None
        sums = network_wgrad_sums(rows, net, wanted, self.wgrad_tile)
        operands = {"x": "x", "last_dz": last_dz or "dy", "kept": kept, "dz": dz, "partial": _allocate(writer, sums)}
        kernel, moved = partial(network_wgrad, gradients=wanted), {**operands, "partial": self._gradients()}
        flops = self._wgrad_flops(rows, wanted)
        self._add(writer, "network wgrad", kernel, self.wgrad_tile, operands, ("partial",), flops, moved)
        return sums

    def _add(
        self,
        writer: Writer,
        kind: str,
        kernel: Any,
        tile: TileConfig,
        operands: Mapping[str, Any],
        writes: tuple[str, ...],
        flops: int,
        moved: Mapping[str, Any] | None = None,
    ) -> None:
        """Add a launch. A kernel with Dropout takes the seed after its other operands."""
        seed = {"seed": "seed"} if self.drops else {}
        run = partial(kernel, network=self.network, tile=tile, keeps=self.keeps)
        moved = {**(operands if moved is None else moved), **seed}
        operands, choice = {**operands, **seed}, Choice(tile, "")
        writer.add(kind, self, operands, writes, run, flops=flops, choice=choice, moved=moved)

    @property
    def name(self) -> str:
        return "network"

    @property
    def label(self) -> str:
        return f"0-{self.network.layers - 1}: " + " -> ".join(map(str, self.network.widths))

    def _parameters(self, writer: Writer) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
        """The names of the weights and of the biases."""
        layers = range(self.network.layers)
        weights = tuple(writer.find(f"weight[{layer}]") for layer in layers)
        return weights, tuple(writer.find(f"bias[{layer}]") for layer in layers)

    def _gradients(self, low: int = 0, high: int | None = None) -> tuple[str, ...]:
        """The names of the gradients of some layers, by default of all. Only those that are wanted have buffers."""
        layers = range(self.network.layers)[low:high]
        return tuple(f"d {kind}[{layer}]" for layer in layers for kind in ("weight", "bias"))

    def _flops(self, rows: int, start: int = 0, end: int | None = None) -> int:
        """FLOPs of the products of some layers, by default of all."""
        return sum(2 * rows * n * k for k, n in list(itertools.pairwise(self.network.widths))[start:end])

    def _dgrad_flops(self, rows: int, wanted: Gradients, dx: str | None) -> int:
        """FLOPs of every dz, from the output down to the lowest layer that needs a gradient, and of dx."""
        return self._flops(rows, wanted.lowest + 1) + (self._flops(rows, 0, 1) if dx else 0)

    def _wgrad_flops(self, rows: int, wanted: Gradients) -> int:
        """FLOPs of the weight gradients that are wanted."""
        return sum(self._flops(rows, index, index + 1) for index, weight in enumerate(wanted.weights) if weight)


def _allocate(writer: Writer, sums: Partial) -> str:
    """Allocate the buffer for partial sums."""
    return writer.allocate("partial", sums.splits, sums.columns, dtype=sums.dtype)
