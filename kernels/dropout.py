"""Dropout in an epilogue: h = m ⊙ a(z) / (1 - p), m ~ Bernoulli(1 - p). The mask m is never stored.

m is a function of a seed, the layer, the row and the column, by counter-based random numbers: Philox 4x32 (Salmon,
Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011). So the backward computes the same mask
again, with any tile. As in torch, dropped elements are multiplied by 0, so NaN and infinities become NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .activation import Activation
from .language import tl, triton
from .launch import Tensors
from .tile_config import TileConfig

__all__ = [
    "SEED_BYTES",
    "Dropout",
    "draw_seed",
    "epilogue_parts",
    "factors",
    "keep_scale",
    "layer_dropout_arguments",
    "layer_dropouts",
    "reads_output",
    "redraws",
    "saves_preactivation",
]  # fmt: skip

ROUNDS = tl.constexpr(7)  # enough to pass BigCrush, by the paper above; Triton's default is 10

SEED_BYTES = 8  # saved for backward: one seed for all layers together


class Dropout(NamedTuple):
    """Dropout of a layer's output.

    Attributes:
        keep: 1 - p, the probability that an element is kept; 0 drops all.
        layer: the layer's number. It gives layers with the same seed different random numbers.
    """

    keep: float
    layer: int


def layer_dropouts(probabilities: Iterable[float]) -> tuple[Dropout | None, ...]:
    """Each layer's Dropout, from the probability with which it drops; None where that is 0."""
    return tuple(Dropout(1.0 - p, layer) if p else None for layer, p in enumerate(probabilities))


def saves_preactivation(activation: Activation, drops: object) -> bool:
    """True if the pre-activation is saved for backward.

    An activation that saves its output needs the pre-activation if Dropout follows, unless it has `scales`.
    """
    return activation.saves_preactivation or (bool(drops) and not activation.scales)


def reads_output(activation: Activation, drops: object) -> bool:
    """True if the derivative reads the output although the pre-activation is saved, because of Dropout."""
    return saves_preactivation(activation, drops) and not activation.saves_preactivation


def redraws(activation: Activation, drops: object) -> bool:
    """True if a layer's gradient needs the mask.

    relu's does not: a dropped element is saved as 0, where relu has no gradient.
    """
    return bool(drops) and not _drops_gradient(activation)


@functools.lru_cache(maxsize=256)
def _drops_gradient(activation: Activation) -> bool:
    """True if the derivative is computed from the output, also after Dropout, and is 0 where the output is 0."""
    backward = activation.reference_backward
    if backward is None or activation.saves_preactivation or not activation.scales:
        return False
    one, zero = (torch.full((), value, device="cpu") for value in (1.0, 0.0))
    return not backward(one, zero, *activation.values)


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator of the device. The device draws it, so a replayed CUDA graph draws a new one."""
    return torch.randint(2**63 - 1, (1,), device=device)


def layer_dropout_arguments(
    tensors: Tensors, seed: Tensor | None, dropout: Dropout | None
) -> tuple[Tensors, tuple[float | None, ...]]:
    """(tensors, scalars) of a launch, for a kernel that takes `seed_ptr`, `keep` and `layer` after its other tensors.

    The seed comes after `tensors`. The scalars come before the kernel's other scalars. Without dropout, all three are
    None, which Triton compiles in as constants: the kernel has no code for Dropout.
    """
    assert (seed is None) == (dropout is None)
    return (tensors, (None, None, None)) if dropout is None else ((*tensors, seed), dropout)


def epilogue_parts(tile: TileConfig, dropout: Dropout | None) -> int:
    """The number of parts of a tile's epilogue. Dropout doubles it, because its random numbers take registers.

    It does not if parts would then be narrower than 16 columns.
    """
    more = 2 * tile.parts
    return tile.parts if dropout is None or tile.block_n < 16 * more else more


@triton.jit
def factors(seed_ptr, keep, layer, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """1 / keep where an element is kept, else 0: (BLOCK_M, BLOCK_N), beginning at row m and column n.

    n is a multiple of 16.
    """
    # Volatile: otherwise the compiler draws the random numbers of all parts of an epilogue first, and holds them.
    seed = tl.load(seed_ptr, volatile=True)
    scale = 1.0 / tl.where(keep > 0, keep, 1.0)
    limit = tl.ceil(keep * 2.0**24).to(tl.int32)
    return tl.where(random_bits(seed, layer, m, n, BLOCK_M, BLOCK_N) < limit, scale, 0.0)


@triton.jit
def keep_scale(keep):
    """1 / keep, as in `factors`: the factor of every element that is kept."""
    return 1.0 / tl.where(keep > 0, keep, 1.0)


@triton.jit
def random_bits(seed, layer, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """24 random bits for each element of a tile, (BLOCK_M, BLOCK_N).

    Philox gives four random numbers at a time, for four columns whose indices differ in bits 0 and 3. One thread holds
    these four columns of a tensor core's accumulator, so no random number moves to another thread.
    """
    rows = (m + tl.arange(0, BLOCK_M)).to(tl.uint32)
    fours = (n // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)
    zeros = tl.zeros((BLOCK_M, BLOCK_N // 4), tl.uint32)
    a, b, c, d = tl.philox(seed, fours[None, :] + zeros, rows[:, None] + zeros, zeros + layer, zeros, ROUNDS)
    bits = tl.join(tl.join(a, c), tl.join(b, d))  # by bit 3, then by bit 0
    bits = tl.reshape(bits, (BLOCK_M, BLOCK_N // 16, 4, 2, 2))
    bits = tl.reshape(tl.permute(bits, (0, 1, 3, 2, 4)), (BLOCK_M, BLOCK_N))
    return (bits >> 8).to(tl.int32)
