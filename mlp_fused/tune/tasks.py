"""The tasks of a tuning run: products and whole networks. Each becomes a row of the table."""

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
    """One product of a layer, with its epilogue.

    Attributes:
        kind: "forward", "dgrad" or "wgrad".
        rows, width_out, width_in: the sizes of the layer.
        dtype: the name of the dtype.
        activation: the activation in the epilogue: the layer's in "forward", the layer below's in "dgrad".
        share: the fraction of its network's FLOPs.
        anchor: True if it belongs to one of `ANCHORS`.
        known: True if the table already has it.
    """

    kind: tile_config.Kind
    rows: int
    width_out: int
    width_in: int
    dtype: ArithmeticName
    activation: str
    share: float = field(compare=False)
    anchor: bool = field(compare=False, default=False)
    known: bool = field(compare=False, default=False)

    def __str__(self) -> str:
        activation = "" if self.activation == "identity" else f", {self.activation}"
        return f"{self.kind} {self.width_in} -> {self.width_out}{activation}, {self.rows} rows, {self.dtype}"

    @property
    def precision(self) -> str:
        """The precision of fp32 products."""
        return ARITHMETIC[self.dtype][1]

    @property
    def key(self) -> tuple[tile_config.Kind, int, int, int, str, str, str]:
        """The key of its row in a table."""
        dtype = dtype_name(ARITHMETIC[self.dtype][0])
        return self.kind, self.rows, self.width_out, self.width_in, dtype, self.precision, self.activation

    @property
    def problem(self) -> tile_config.Problem:
        """The problem for which a tile is chosen."""
        return table_files.Gemm(*self.key, None, None, 1.0).problem


@dataclass(frozen=True)
class Whole:
    """A whole network, in training (forward and backward) or in inference.

    `share`, `anchor` and `known` are those of `Product`.
    """

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
        """The key of its row in a table."""
        work = self.workload
        dtype = dtype_name(ARITHMETIC[work.dtype][0])
        return work.widths, work.rows, dtype, self.precision, layer_activations(work)[0].name, self.training


Task = Product | Whole
Row = table_files.Gemm | table_files.Network


def products(workload: Workload) -> list[Product]:
    """List the three products of each layer, without duplicates."""
    layers = list(itertools.pairwise(workload.widths))
    total = 3 * sum(n * k for k, n in layers)
    unique: dict[tuple[Any, ...], Product] = {}
    for index, (k, n) in enumerate(layers):
        own = workload.activation if index + 1 < len(layers) else "identity"
        below = workload.activation if index else "identity"
        kinds: list[tuple[tile_config.Kind, str]] = [("forward", own), ("dgrad", below), ("wgrad", "identity")]
        for kind, activation in kinds:
            product = Product(kind, workload.rows, n, k, workload.dtype, activation, n * k / total)
            key = product.key[:-1]
            if other := unique.get(key):
                # If two layers differ only in the activation, measure the one with an activation. The estimate chooses
                # the tile of the other.
                product = replace(
                    product if other.activation == "identity" else other, share=other.share + product.share
                )
            unique[key] = product
    return list(unique.values())


def list_tasks(workloads: Iterable[Workload], gpu: devices.Device, known: Iterable[tuple[Any, ...]] = ()) -> list[Task]:
    """List the tasks to measure, without duplicates, in the order in which they are measured.

    They are sorted by four keys: new tasks before `known` ones, products before networks, anchors before others, and
    larger shares of the FLOPs before smaller ones.
    """
    unique: dict[tuple[Any, ...], Task] = {}
    anchors = set()
    for workload in workloads:
        tasks: list[Task] = [*products(workload)]
        for training in (True, False):
            if isinstance(network_plan(workload, gpu, training, False), network_path.NetworkPath):
                tasks.append(Whole(workload, training))
        for task in tasks:
            first = unique.setdefault(task.key, task)
            if task.share > first.share:
                unique[task.key] = replace(first, share=task.share)
            if workload in ANCHORS:
                anchors.add(task.key)
    known = set(known)
    ranked = [replace(task, anchor=key in anchors, known=key in known) for key, task in unique.items()]
    return sorted(ranked, key=lambda task: (task.known, isinstance(task, Whole), not task.anchor, -task.share))


def network_paths(whole: Whole, gpu: devices.Device) -> dict[str, network_path.NetworkPath]:
    """Return the network paths of a whole network, by name: recompute and stored, or network for inference."""
    named = {}
    for name, recompute in (("recompute", True), ("stored", False)) if whole.training else (("network", False),):
        path = network_plan(whole.workload, gpu, whole.training, recompute)
        if isinstance(path, network_path.NetworkPath) and path.formulation in (name, None):
            named[name] = path
    return named


def network_plan(
    workload: Workload, gpu: devices.Device, training: bool, recompute: bool
) -> network_path.NetworkPath | str:
    """Return the network path by the rules alone, without measured tables, or the reason why there is none."""
    dtype, precision = ARITHMETIC[workload.dtype]
    strides = tuple((k, 1, 1) for k in workload.widths[:-1])
    activations = tuple(layer_activations(workload))
    return paths.network_path(
        workload.widths, strides, activations, dtype, precision, gpu, training, recompute, torch_too=True
    )


def layer_activations(workload: Workload) -> list[Activation]:
    """Return the activation of each layer. The last layer has none ("identity")."""
    return [ACTIVATIONS[workload.activation]] * (len(workload.widths) - 2) + [ACTIVATIONS["identity"]]
