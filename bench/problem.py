"""The grid: every problem that is measured, as frozen rows with ids.

    Problem   what is computed: widths d_0 … d_L, rows M, dtype, activation, how the input lies in memory
    Cell      one row of a results file: a problem, and the phase of it that is timed

GRID lists the cells in the order in which a limited time is spent on them: the anchors first, one or two a family, then
family by family. Phases of one problem stand side by side, so that what was built and compiled for one serves the next.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import pairwise

from mlp_fused.kernels.activations import resolve

FAMILIES = ("seed", "narrow", "middle", "large", "gemm", "odd", "warmup", "copy")

# forward      y = model(x) without autograd
# backward     gradients of every parameter from dY, after a forward that is not timed
# training     forward and backward
# step         zero_grad, forward, loss, backward, Adam
# copy         x from the host to the device, beside the time of the forward, the backward and the step
# first_touch  context, first allocation, first copy, first launch, in a fresh process
# lecture      a square product on the CPU; its operands copied; the product on the GPU; for the first and second time
# warmup       model.warmup(rows) in a fresh process, with Triton's cache empty and with the kernels in it
# and of the gemm family, one kernel each, on a layer (K, N) for M rows (see gemm.py):
# layer_forward    h = a(x W^T + b);  layer_forward_z also writes z = x W^T + b, as training does
# dgrad            dx = (dz W) * a'(saved), a of the layer below
# wgrad            dW = dz^T h, db = the sum of dz's rows
GEMM_PHASES = ("layer_forward", "layer_forward_z", "dgrad", "wgrad")
FRESH_PHASES = ("first_touch", "lecture", "warmup")  # each in a process of its own
PHASES = ("forward", "backward", "training", "step", *GEMM_PHASES, "copy", *FRESH_PHASES)
COPIED_PHASES = ("forward", "backward", "step")  # those that stand beside the copy in a copy row


@dataclass(frozen=True)
class Problem:
    """A network and its input: widths (d_0, …, d_L), x (rows, d_0).

    `layout` is "contiguous", "transposed" (x is the transpose of a contiguous (d_0, rows)) or "sliced" (x is columns 1
    to d_0 of a contiguous (rows, 2 d_0): rows far apart, and not aligned to 16 bytes). With `cross_entropy` the step's
    loss is the cross entropy with random labels, otherwise a gradient dY is given.
    """

    widths: tuple[int, ...]
    rows: int
    dtype: str = "fp32"  # "fp32", "bf16" or "fp16"
    activation: str = "relu"
    layout: str = "contiguous"
    cross_entropy: bool = False

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.widths)), self.activation, self.dtype, f"m{self.rows}"]
        if self.layout != "contiguous":
            parts.append(self.layout)
        return "-".join(parts)


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
        """Where the cell means something: a copy to the device needs one, and so do the kernels by themselves."""
        needs_gpu = self.phase in ("copy", "first_touch", "warmup", *GEMM_PHASES)
        return ("cuda",) if needs_gpu else ("cpu", "cuda")


def _cells(family: str, problems: Iterable[Problem], phases: Iterable[str]) -> list[Cell]:
    phases = tuple(phases)
    return [Cell(family, problem, phase) for problem in problems for phase in phases]


def _seed() -> list[Cell]:
    problems = [Problem((784, 512, 512, 10), rows, cross_entropy=True) for rows in (64, 256, 1024)]
    return _cells("seed", problems, ("forward", "backward", "step"))


def _narrow() -> list[Cell]:
    shapes: list[tuple[tuple[int, ...], int]]
    shapes = [((width,) * 5, rows) for width in (16, 32, 64, 128) for rows in (2**14, 2**17, 2**20, 2**21)]
    shapes.append(((16, 64, 64, 16), 2**21))
    shapes += [((128, *(width,) * 5, 3), rows) for width in (64, 128) for rows in (2**14, 2**18, 2**21)]
    problems = [Problem(widths, rows, dtype) for widths, rows in shapes for dtype in ("fp16", "bf16", "fp32")]
    return _cells("narrow", problems, ("forward", "training", "step"))


def _middle() -> list[Cell]:
    problems = [
        Problem((width,) * 5, rows, "bf16", activation)
        for width in (256, 512, 1024)
        for rows in (4096, 16384, 65536)
        for activation in ("relu", "gelu")
    ]
    return _cells("middle", problems, ("forward", "backward", "training", "step"))


def _large() -> list[Cell]:
    problems = [
        Problem(widths, rows, dtype, "gelu")
        for widths in ((4096, 16384, 4096), (1024, 4096, 1024))
        for rows in (1024, 8192, 32768)
        for dtype in ("bf16", "fp32")
    ]
    return _cells("large", problems, ("forward", "backward", "training", "step"))


def _odd() -> list[Cell]:
    shapes = [
        ((33, 33, 33, 33), 65537, "relu", "contiguous"),
        ((100, 100, 100, 100), 65537, "relu", "contiguous"),
        ((480, 480, 480, 480), 16385, "gelu", "contiguous"),
        ((1000, 1000, 1000, 1000), 4099, "relu", "contiguous"),
        ((1, 64, 64, 1), 65537, "relu", "contiguous"),
        ((33, 100, 480, 1000, 1), 4099, "silu", "contiguous"),
        ((256, 512, 256), 16384, "gelu", "transposed"),
        ((256, 512, 256), 16384, "gelu", "sliced"),
    ]
    problems = [
        Problem(widths, rows, dtype, activation, layout)
        for widths, rows, activation, layout in shapes
        for dtype in ("bf16", "fp32")
    ]
    return _cells("odd", problems, ("forward", "training"))


def _gemm(networks: Iterable[Cell]) -> list[Cell]:
    """Each product of the networks once, with the activation in its epilogue: the layer's own, or for dgrad the one of
    the layer below. A weight gradient has none.
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
            if resolve(activation).keeps_preactivation:
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


def _copy(others: Iterable[Cell]) -> list[Cell]:
    """Each input of the other families once in fp32 and once in 16 bits: the activation changes nothing in a copy."""
    inputs: dict[tuple[object, ...], Problem] = {}
    for problem in (cell.problem for cell in others):
        inputs.setdefault((problem.widths, problem.rows, problem.layout), problem)
    problems = [replace(problem, dtype=dtype) for problem in inputs.values() for dtype in ("fp32", "bf16")]
    return [
        *_cells("copy", problems, ("copy",)),
        Cell("copy", Problem((784, 512, 512, 10), 1024), "first_touch"),
        Cell("copy", Problem((10000, 10000), 10000, activation="identity"), "lecture"),
    ]


ANCHORS = (
    "seed-784x512x512x10-relu-fp32-m256-step",
    "narrow-64x64x64x64x64-relu-bf16-m1048576-training",
    "middle-512x512x512x512x512-gelu-bf16-m16384-training",
    "middle-1024x1024x1024x1024x1024-gelu-bf16-m16384-training",
    "large-4096x16384x4096-gelu-bf16-m8192-training",
    "gemm-4096x16384-gelu-bf16-m8192-layer_forward",
    "odd-1000x1000x1000x1000-relu-bf16-m4099-training",
    "warmup-784x512x512x10-relu-fp32-m64-warmup",
    "copy-784x512x512x10-relu-fp32-m1024-copy",
)


def _grid() -> tuple[Cell, ...]:
    seed, narrow, middle, large, odd = _seed(), _narrow(), _middle(), _large(), _odd()
    gemm = _gemm([*seed, *middle, *large])
    copy = _copy([*seed, *narrow, *middle, *large, *odd])
    families = (seed, narrow, middle, large, gemm, odd, _warmup(), copy)
    named = {str(cell): cell for family in families for cell in family}
    anchors = {name: replace(named[name], anchor=True) for name in ANCHORS}
    return (*anchors.values(), *(cell for name, cell in named.items() if name not in anchors))


GRID = _grid()


def cases(family: str) -> list[tuple[Cell, str]]:
    """(cell, device) for every cell of a family and every device on which it means something."""
    return [(cell, device) for cell in GRID if cell.family == family for device in cell.devices]


def select(pattern: str = "*") -> list[Cell]:
    """The cells whose id matches a shell pattern such as "narrow-*-forward", in the grid's order.

    Raises ValueError where nothing matches.
    """
    cells = [cell for cell in GRID if fnmatchcase(str(cell), pattern)]
    if not cells:
        raise ValueError(f"no cell of the grid matches {pattern!r}; ids look like {GRID[0]}")
    return cells
