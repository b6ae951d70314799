"""The grid: the networks that the benches and `mlp-fused tune` measure, and the anchors, which are measured first."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from .dtypes import ArithmeticName

__all__ = ["ACTIVATION", "ANCHORS", "GRID", "Family", "Workload"]

ACTIVATION = "relu"


@dataclass(frozen=True)
class Workload:
    """A network and its batch size.

    Attributes:
        widths: the widths from the input to the output, (d_0, …, d_L).
        rows: the batch size; x is (rows, d_0).
        dtype: the name of the dtype.
        activation: the activation after every hidden layer.
    """

    widths: tuple[int, ...]
    rows: int
    dtype: ArithmeticName = "fp32"
    activation: str = ACTIVATION


@dataclass(frozen=True)
class Family:
    """All combinations of some networks, batch sizes, dtypes and activations.

    Attributes:
        name: the name of the family. Entries of `GRID` with the same name belong to one family.
        layouts: the memory layouts of the input, which are described in bench/problem.py. Only the benches use them.
        cross_entropy: True if the loss of the benches' training step is the cross entropy.
    """

    name: str
    widths: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    dtypes: tuple[ArithmeticName, ...]
    activations: tuple[str, ...] = (ACTIVATION,)
    layouts: tuple[str, ...] = ("contiguous",)
    cross_entropy: bool = False

    @property
    def workloads(self) -> list[Workload]:
        """The combinations: the last field, activation, varies fastest."""
        return [
            Workload(widths, rows, dtype, activation)
            for widths, rows, dtype, activation in itertools.product(
                self.widths, self.rows, self.dtypes, self.activations
            )
        ]


ALL: tuple[ArithmeticName, ...] = ("fp16", "bf16", "fp32")
BOTH: tuple[ArithmeticName, ...] = ("bf16", "fp32")

GRID = (
    Family("seed", ((784, 512, 512, 10),), (64, 256, 1024), ("fp32",), cross_entropy=True),
    Family("narrow", tuple((width,) * 5 for width in (16, 32, 64, 128)), (2**14, 2**17, 2**20, 2**21), ALL),
    Family("narrow", ((16, 64, 64, 16),), (2**21,), ALL),
    Family("narrow", tuple((128, *(width,) * 5, 3) for width in (64, 128)), (2**14, 2**18, 2**21), ALL),
    Family(
        "middle", tuple((width,) * 5 for width in (256, 512, 1024)), (4096, 16384, 65536), ("bf16",), ("relu", "gelu")
    ),
    Family("large", ((4096, 16384, 4096), (1024, 4096, 1024)), (1024, 8192, 32768), BOTH, ("gelu",)),
    Family("odd", ((33,) * 4, (100,) * 4, (1, 64, 64, 1)), (65537,), BOTH),
    Family("odd", ((480,) * 4,), (16385,), BOTH, ("gelu",)),
    Family("odd", ((1000,) * 4,), (4099,), BOTH),
    Family("odd", ((33, 100, 480, 1000, 1),), (4099,), BOTH, ("silu",)),
    Family("odd", ((256, 512, 256),), (16384,), BOTH, ("gelu",), layouts=("transposed", "sliced")),
)

ANCHORS = (
    Workload((784, 512, 512, 10), 256, "fp32"),
    Workload((64,) * 5, 2**20, "bf16"),
    Workload((512,) * 5, 16384, "bf16", "gelu"),
    Workload((1024,) * 5, 16384, "bf16", "gelu"),
    Workload((4096, 16384, 4096), 8192, "bf16", "gelu"),
    Workload((1000,) * 4, 4099, "bf16"),
)
