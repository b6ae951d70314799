"""The tasks of a tuning run: products and whole networks, each a row of a table to be."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from ..dtypes import ARITHMETIC, ArithmeticName, dtype_name
from ..engine import network_path, paths, table_files
from ..grid import ANCHORS, Workload
from ..kernels import devices, tile_config
from ..kernels.activation import Activation
from ..kernels.activations import ACTIVATIONS


@dataclass(frozen=True)
class Product:
    """One product of a layer, with what its epilogue does: a row of a table to be."""

    kind: tile_config.Kind
    rows: int
    width_out: int
    width_in: int
    dtype: ArithmeticName
    activation: str  # forward: the layer's own; dgrad: that of the layer below
    share: float = field(compare=False)  # of its network's FLOPs
    anchor: bool = field(compare=False, default=False)
    known: bool = field(compare=False, default=False)  # whether the table has it already

    def __str__(self) -> str:
        activation = "" if self.activation == "identity" else f", {self.activation}"
        return f"{self.kind} {self.width_in} -> {self.width_out}{activation}, {self.rows} rows, {self.dtype}"

    @property
    def precision(self) -> str:
        """The precision of fp32 products."""
        return ARITHMETIC[self.dtype][1]

    @property
    def key(self) -> tuple[tile_config.Kind, int, int, int, str, str, str]:
        dtype = dtype_name(ARITHMETIC[self.dtype][0])
        return self.kind, self.rows, self.width_out, self.width_in, dtype, self.precision, self.activation

    @property
    def problem(self) -> tile_config.Problem:
        """The problem that a tile is chosen by."""
        return table_files.Gemm(*self.key, None, None, 1.0).problem


@dataclass(frozen=True)
class Whole:
    """A network as a whole, in training (forward and backward) or in inference: a row of a table to be."""

    workload: Workload
    training: bool
    share: float = field(compare=False, default=1.0)
    anchor: bool = field(compare=False, default=False)
    known: bool = field(compare=False, default=False)

    def __str__(self) -> str:
        work = self.workload
        widths = "-".join(map(str, work.widths))
        phase = "training" if self.training else "inference"
        return f"{phase} {widths}, {work.activation}, {work.rows} rows, {work.dtype}"

    @property
    def precision(self) -> str:
        """The precision of fp32 products."""
        return ARITHMETIC[self.workload.dtype][1]

    @property
    def key(self) -> tuple[tuple[int, ...], int, str, str, str, bool]:
        work = self.workload
        dtype = dtype_name(ARITHMETIC[work.dtype][0])
        return work.widths, work.rows, dtype, self.precision, layer_activations(work)[0].name, self.training


Task = Product | Whole
Row = table_files.Gemm | table_files.Network


def products(workload: Workload) -> list[Product]:
    """The three products of each layer, each once."""
    layers = list(itertools.pairwise(workload.widths))
    total = 3 * sum(n * k for k, n in layers)
    found: dict[tuple[Any, ...], Product] = {}
    for index, (k, n) in enumerate(layers):
        own = workload.activation if index + 1 < len(layers) else "identity"
        below = workload.activation if index else "identity"
        each: list[tuple[tile_config.Kind, str]] = [("forward", own), ("dgrad", below), ("wgrad", "identity")]
        for kind, activation in each:
            product = Product(kind, workload.rows, n, k, workload.dtype, activation, n * k / total)
            alike = product.key[:-1]
            if known := found.get(alike):
                # Of layers alike, the one whose epilogue has something to do; the estimate decides the other.
                product = replace(
                    product if known.activation == "identity" else known, share=known.share + product.share
                )
            found[alike] = product
    return list(found.values())


def list_tasks(workloads: Iterable[Workload], gpu: devices.Device, known: Iterable[tuple[Any, ...]] = ()) -> list[Task]:
    """The tasks to measure, each once, in order.

    What is not `known` yet; products, then networks; anchors; what most of a network's FLOPs are in.
    """
    found: dict[tuple[Any, ...], Task] = {}
    anchors = set()
    for workload in workloads:
        each: list[Task] = [*products(workload)]
        for training in (True, False):
            if isinstance(network_plan(workload, gpu, training, False), network_path.NetworkPath):
                each.append(Whole(workload, training))
        for task in each:
            first = found.setdefault(task.key, task)
            if task.share > first.share:
                found[task.key] = replace(first, share=task.share)
            if workload in ANCHORS:
                anchors.add(task.key)
    known = set(known)
    ranked = [replace(task, anchor=key in anchors, known=key in known) for key, task in found.items()]
    return sorted(ranked, key=lambda task: (task.known, isinstance(task, Whole), not task.anchor, -task.share))


def network_paths(whole: Whole, gpu: devices.Device) -> dict[str, network_path.NetworkPath]:
    """The paths of a whole network through its own kernels, by name."""
    found = {}
    for name, recompute in (("recompute", True), ("stored", False)) if whole.training else (("network", False),):
        path = network_plan(whole.workload, gpu, whole.training, recompute)
        if isinstance(path, network_path.NetworkPath) and path.formulation in (name, None):
            found[name] = path
    return found


def network_plan(
    workload: Workload, gpu: devices.Device, training: bool, recompute: bool
) -> network_path.NetworkPath | str:
    """The network path that the backend "auto" takes, as if the user asked for it: no table is consulted."""
    dtype, precision = ARITHMETIC[workload.dtype]
    strides = tuple((k, 1, 1) for k in workload.widths[:-1])
    activations = tuple(layer_activations(workload))
    return paths.network_path(
        workload.widths, strides, activations, dtype, precision, gpu, training, recompute, torch_too=True
    )


def layer_activations(workload: Workload) -> list[Activation]:
    return [ACTIVATIONS[workload.activation]] * (len(workload.widths) - 2) + [ACTIVATIONS["identity"]]
