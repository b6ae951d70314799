"""The kernels that a row of a measured table was taken of, by the digest of their sources.

forward, dgrad, wgrad   the product's kernel, what its epilogue calls of the activation, the sum of partial sums
networks                every kernel of the network's path and of the path of layers that the row compares, with the
                        activation, and the rule that gives a network kernel its tile, which such a row does not have

A row with another digest is of an older kernel and holds no more, except where torch was faster: a kernel takes torch's
place when it was measured, not when it was changed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeVar

from ..kernels import sources
from ..kernels.activations import ACTIVATIONS
from ..kernels.sources import Source, source
from .table_files import Gemm, Network

__all__ = ["current_digest", "holds", "is_outdated", "stamped"]

Row = TypeVar("Row", Gemm, Network)

PRODUCTS = {
    "forward": (source("layer_forward", "layer_forward_kernel"),),
    "dgrad": (source("layer_backward", "dgrad_kernel"),),
    "wgrad": (source("layer_backward", "wgrad_kernel"), source("partial_sums", "sum_partials_kernel")),
}
DERIVES = {"forward": False, "dgrad": True, "wgrad": None}  # whether the epilogue has a derivative; None: no activation
INFERENCE = ("network_forward", "layer_forward")  # modules
TRAINING = ("network*", "layer_*", "partial_sums")  # by their names, so that a new one counts by itself
TILES = (source("network_tiles", "network_tile"), source("network_tiles", "network_wgrad_tile"))


def current_digest(row: Gemm | Network) -> str:
    """The digest of the kernels as they are now that run a row's problem."""
    if isinstance(row, Network):
        return _digest_of_network(row.training, row.activation, row.dtype)
    precision = None if row.tile is None else row.tile.precision
    return _digest_of_product(row.kind, row.activation, row.dtype, precision)


@functools.lru_cache(maxsize=256)
def _digest_of_product(kind: str, activation: str | None, dtype: str, precision: str | None) -> str:
    derives = DERIVES[kind]
    functions = () if derives is None else _activation(activation, derives)
    return sources.digest((*PRODUCTS[kind], *functions), _known(dtype, precision))


@functools.lru_cache(maxsize=256)
def _digest_of_network(training: bool, activation: str, dtype: str) -> str:
    kernels = [kernel for modules in (TRAINING if training else INFERENCE) for kernel in sources.kernels_in(modules)]
    return sources.digest((*kernels, *TILES, *_activation(activation, training)), _known(dtype, None))


def _activation(name: str | None, derives: bool) -> tuple[Source | None, ...]:
    activation = ACTIVATIONS.get(name or "")
    if activation is None:
        return ()
    functions = (activation.forward, activation.backward) if derives else (activation.forward,)
    return tuple(map(sources.source_of, functions))


def _known(dtype: str, precision: str | None) -> dict[str, object]:
    """The constants of a row's kernels: 16-bit operands are multiplied one way.

    bf16x6 multiplies its parts another way, and a row without a tile does not say which way its fp32 was multiplied.
    """
    if dtype != "float32":
        return {"PRECISION": "ieee"}
    return {} if precision in (None, "bf16x6") else {"PRECISION": precision}


def stamped(row: Row) -> Row:
    """The row as measured with the kernels as they are now."""
    return dataclasses.replace(row, kernel=current_digest(row))


def is_outdated(row: Gemm | Network) -> bool:
    """True if a row was measured with other kernels than those of today, or does not say with which."""
    return row.kernel != current_digest(row)


def holds(row: Gemm | Network) -> bool:
    """True if a row's choice is taken: of today's kernels, or for torch."""
    by_torch = row.tile is None if isinstance(row, Gemm) else row.path == "torch"
    return by_torch or not is_outdated(row)
