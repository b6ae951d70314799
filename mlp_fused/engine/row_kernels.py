"""Digests of the kernels that a row of a measured table is about.

forward, dgrad, wgrad   the product's kernel, the activation's functions in its epilogue, the sum of partial sums; if
                        planes were measured, also the kernels that split operands and multiply planes
networks                the kernels of the network path and of the layer path, which the row compares (for inference,
                        only those of the forward; in fp32 also those that split operands and multiply planes); the
                        activation; and the rule that chooses a network kernel's tile, because such a row has no tile

A row with another digest was measured with an older kernel, and is no longer used. A row in which torch was faster is
still used: a changed kernel replaces torch only after it was measured.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeVar

from ..kernels import sources
from ..kernels.activations import ACTIVATIONS
from ..kernels.planes import PLANES
from ..kernels.sources import Source, source
from .table_files import Gemm, Network

__all__ = ["current_digest", "holds", "is_outdated", "stamped"]

Row = TypeVar("Row", Gemm, Network)

PRODUCTS = {
    "forward": (source("layer_forward", "layer_forward_kernel"),),
    "dgrad": (source("layer_backward", "dgrad_kernel"),),
    "wgrad": (source("layer_backward", "wgrad_kernel"), source("partial_sums", "sum_partials_kernel")),
}
BY_PLANES = {
    kind: (source("plane_products", f"{kind}_by_planes_kernel"), source("planes", "split_kernel"), *sums)
    for kind, (_, *sums) in PRODUCTS.items()
}
DERIVES = {"forward": False, "dgrad": True, "wgrad": None}  # True if the epilogue has a derivative; None: no activation
INFERENCE = ("network_forward", "layer_forward")  # modules
TRAINING = ("network*", "layer_*", "partial_sums")  # patterns, which include a new module of that name
PLANES_MODULES = "plane*"  # only fp32 layers run by planes
# The possible values of PRECISION in a product that is not by planes.
WITHOUT_PLANES = frozenset({"ieee", "tf32", "bf16x6"})
TILES = (source("network_tiles", "network_tile"), source("network_tiles", "network_wgrad_tile"))


def current_digest(row: Gemm | Network) -> str:
    """The digest of the present kernels for a row's problem."""
    if isinstance(row, Network):
        return _digest_of_network(row.training, row.activation, row.dtype)
    precision = None if row.tile is None else row.tile.precision
    return _digest_of_product(row.kind, row.activation, row.dtype, precision, row.planes_ms is not None)


@functools.lru_cache(maxsize=256)
def _digest_of_product(kind: str, activation: str | None, dtype: str, precision: str | None, by_planes: bool) -> str:
    derives = DERIVES[kind]
    functions = () if derives is None else _activation(activation, derives)
    kernels = (() if precision in PLANES else PRODUCTS[kind]) + (BY_PLANES[kind] if by_planes else ())
    return sources.digest((*kernels, *functions), _known_constants(dtype, precision, by_planes))


@functools.lru_cache(maxsize=256)
def _digest_of_network(training: bool, activation: str, dtype: str) -> str:
    modules = (TRAINING if training else INFERENCE) + ((PLANES_MODULES,) if dtype == "float32" else ())
    kernels = [kernel for pattern in modules for kernel in sources.kernels_in(pattern)]
    known = {} if dtype == "float32" else _known_constants(dtype, None, False)
    return sources.digest((*kernels, *TILES, *_activation(activation, training)), known)


def _activation(name: str | None, derives: bool) -> tuple[Source | None, ...]:
    activation = ACTIVATIONS.get(name or "")
    if activation is None:
        return ()
    functions = (activation.forward, activation.backward) if derives else (activation.forward,)
    return tuple(map(sources.find_source, functions))


def _known_constants(dtype: str, precision: str | None, by_planes: bool) -> dict[str, object]:
    """The `known` of `sources.digest` for a row's kernels: the value of PRECISION, or all values that it may have.

    It may have several: with "bf16x6", `dot` calls itself for the parts with "ieee"; and a row without a tile does not
    say how fp32 was multiplied.
    """
    if dtype != "float32":
        return {"PRECISION": "ieee"}
    values = WITHOUT_PLANES if precision in (None, "bf16x6") else frozenset({precision})
    if by_planes:
        values |= {*PLANES, "redo"}
    return {"PRECISION": values if len(values) > 1 else precision}


def stamped(row: Row) -> Row:
    """The row, marked as measured with the present kernels."""
    return dataclasses.replace(row, kernel=current_digest(row))


def is_outdated(row: Gemm | Network) -> bool:
    """True if a row was measured with other kernels than the present ones, or does not name its kernels."""
    return row.kernel != current_digest(row)


def holds(row: Gemm | Network) -> bool:
    """True if a row is used: it was measured with the present kernels, or torch was faster."""
    by_torch = row.tile is None if isinstance(row, Gemm) else row.path == "torch"
    return by_torch or not is_outdated(row)
