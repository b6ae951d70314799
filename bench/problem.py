"""The grid of the benches: the networks of mlp_fused/grid.py in each phase, their single products, and their inputs.

    Problem   a network and its input: widths d_0 … d_L, rows M, dtype, activation, memory layout of the input
    Cell      one row of a results file: a problem and the phase that is timed

GRID lists the cells in the order in which they are measured, because time may run out: first the anchors, one or two of
each family, then family by family. The phases of a problem follow each other, so that they share its tensors and
compiled kernels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise

from mlp_fused.dtypes import ArithmeticName
from mlp_fused.engine.recognize import resolve
from mlp_fused.grid import ANCHORS as ANCHOR_NETWORKS
from mlp_fused.grid import GRID as NETWORKS
from mlp_fused.grid import Workload

FAMILIES = ("seed", "narrow", "middle", "large", "gemm", "odd", "warmup", "copy")

# The families of whole networks, and the phases in which each is measured.
NETWORK_PHASES = {
    "seed": ("forward", "backward", "step"),
    "narrow": ("forward", "training", "step"),
    "middle": ("forward", "backward", "training", "step"),
    "large": ("forward", "backward", "training", "step"),
    "odd": ("forward", "training"),
}

# forward      y = model(x) without autograd
# backward     gradients of every parameter from dY, after a forward that is not timed
# training     forward and backward
# step         zero_grad, forward, loss, backward, Adam
# copy         the copy of x from the host to the device, compared with the forward, the backward and the step
# first_touch  context, first allocation, first copy and first launch in a new process
# lecture      a square product on the CPU, the copy of its operands, and the product on the GPU; each of them twice
# warmup       model.warmup(rows) in a new process, with an empty and with a filled Triton cache
#
# The phases of the gemm family are one kernel each, for a layer (K, N) and M rows (see gemm.py):
# layer_forward    h = a(x W^T + b);  layer_forward_z also writes z = x W^T + b, as training does
# dgrad            dx = (dz W) * a'(saved), a of the layer below
# wgrad            dW = dz^T h, db = the sum of dz's rows
GEMM_PHASES = ("layer_forward", "layer_forward_z", "dgrad", "wgrad")
FRESH_PHASES = ("first_touch", "lecture", "warmup")  # these run in a new process
PHASES = ("forward", "backward", "training", "step", *GEMM_PHASES, "copy", *FRESH_PHASES)
COPIED_PHASES = ("forward", "backward", "step")  # a copy row compares the copy with these


@dataclass(frozen=True)
class Problem(Workload):
    """A network and its input.

    Attributes:
        layout: "contiguous", "transposed" (x is the transpose of a contiguous (d_0, rows)) or "sliced" (x is columns
            1 to d_0 of a contiguous (rows, 2 d_0): rows far apart, and not aligned to 16 bytes).
        cross_entropy: the step's loss is the cross entropy with random labels; otherwise a gradient dY is given.
    """

    layout: str = "contiguous"
    cross_entropy: bool = False

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.widths)), self.activation, self.dtype, f"m{self.rows}"]
        if self.layout != "contiguous":
            parts.append(self.layout)
        return "-".join(parts)

    @property
    def workload(self) -> Workload:
        """The network and its batch, without the fields that only the benches have."""
        return Workload(self.widths, self.rows, self.dtype, self.activation)


@dataclass(frozen=True)
class Cell:
    """One measured row. An anchor is measured first, and against every baseline."""

    family: str
    problem: Problem
    phase: str
    anchor: bool = False

    def __str__(self) -> str:
        return f"{self.family}-{self.problem}-{self.phase}"

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices on which the cell can be measured. Copies and single kernels need a GPU."""
        needs_gpu = self.phase in ("copy", "first_touch", "warmup", *GEMM_PHASES)
        return ("cuda",) if needs_gpu else ("cpu", "cuda")


def _cells(family: str, problems: Iterable[Problem], phases: Iterable[str]) -> list[Cell]:
    phases = tuple(phases)
    return [Cell(family, problem, phase) for problem in problems for phase in phases]


def _networks(name: str) -> list[Cell]:
    """The cells of a family of whole networks, in the phases of NETWORK_PHASES."""
    problems = [
        Problem(work.widths, work.rows, work.dtype, work.activation, layout, family.cross_entropy)
        for family in NETWORKS
        if family.name == name
        for layout in family.layouts
        for work in family.workloads
    ]
    return _cells(name, problems, NETWORK_PHASES[name])


def _gemm(networks: Iterable[Cell]) -> list[Cell]:
    """The cells of the networks' products, without duplicates.

    The activation of a problem is the one in the kernel's epilogue: the layer's own in a forward, that of the layer
    below in dgrad, none in wgrad.
    """
    phases: dict[Problem, set[str]] = {}

    def add(layer: tuple[int, int], network: Problem, activation: str, *names: str) -> None:
        problem = Problem(layer, network.rows, network.dtype, activation)
        phases.setdefault(problem, set()).update(names)

    for network in dict.fromkeys(cell.problem for cell in networks):
        layers = list(pairwise(network.widths))
        for i, layer in enumerate(layers):
            activation = network.activation if i + 1 < len(layers) else "identity"
            add(layer, network, activation, "layer_forward")
            if resolve(activation).saves_preactivation:
                add(layer, network, activation, "layer_forward_z")
            if i > 0:
                add(layer, network, network.activation, "dgrad")
            add(layer, network, "identity", "wgrad")
    return [
        cell
        for problem, names in phases.items()
        for cell in _cells("gemm", [problem], (phase for phase in GEMM_PHASES if phase in names))
    ]


def _warmup() -> list[Cell]:
    problems = [Problem((784, 512, 512, 10), 64), Problem((1024,) * 5, 16384, "bf16", "gelu")]
    return _cells("warmup", problems, ["warmup"])


COPIED_DTYPES: tuple[ArithmeticName, ...] = ("fp32", "bf16")


def _copy(others: Iterable[Cell]) -> list[Cell]:
    """The cells that copy the inputs of the other families, in fp32 and in bf16, without duplicates."""
    inputs: dict[tuple[object, ...], Problem] = {}
    for problem in (cell.problem for cell in others):
        inputs.setdefault((problem.widths, problem.rows, problem.layout), problem)
    problems = [replace(problem, dtype=dtype) for problem in inputs.values() for dtype in COPIED_DTYPES]
    return [
        *_cells("copy", problems, ("copy",)),
        Cell("copy", Problem((784, 512, 512, 10), 1024), "first_touch"),
        Cell("copy", Problem((10000, 10000), 10000, activation="identity"), "lecture"),
    ]


def _is_anchor(cell: Cell) -> bool:
    """True for the step or training of the grid's anchors, and for one cell of each other family."""
    if cell.family not in NETWORK_PHASES:
        return str(cell) in OTHER_ANCHORS
    phase = "step" if cell.problem.cross_entropy else "training"
    return cell.phase == phase and cell.problem.workload in ANCHOR_NETWORKS


OTHER_ANCHORS = (
    "gemm-4096x16384-gelu-bf16-m8192-layer_forward",
    "warmup-784x512x512x10-relu-fp32-m64-warmup",
    "copy-784x512x512x10-relu-fp32-m1024-copy",
)


def _grid() -> tuple[Cell, ...]:
    families = {name: _networks(name) for name in NETWORK_PHASES}
    networks = [cell for cells in families.values() for cell in cells]
    families["gemm"] = _gemm([*families["seed"], *families["middle"], *families["large"]])
    families["warmup"], families["copy"] = _warmup(), _copy(networks)
    cells = [replace(cell, anchor=_is_anchor(cell)) for name in FAMILIES for cell in families[name]]
    return tuple(sorted(cells, key=lambda cell: not cell.anchor))


GRID = _grid()
ANCHORS = tuple(str(cell) for cell in GRID if cell.anchor)


def cases(family: str) -> list[tuple[Cell, str]]:
    """(cell, device) for every cell of a family and every device on which it can be measured."""
    return [(cell, device) for cell in GRID if cell.family == family for device in cell.devices]


def select(pattern: str = "*") -> list[Cell]:
    """The cells whose id matches a shell pattern such as "narrow-*-forward", in the grid's order.

    Raises ValueError where nothing matches.
    """
    cells = [cell for cell in GRID if fnmatchcase(str(cell), pattern)]
    if not cells:
        raise ValueError(f"no cell of the grid matches {pattern!r}; ids look like {GRID[0]}")
    return cells
