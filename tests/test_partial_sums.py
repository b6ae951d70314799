"""Sums of partial sums: every tile adds all of them in the same order, and the rule picks the fastest measured tile."""

from __future__ import annotations

import pytest
import torch
from narrow_readings import sums

from mlp_fused.kernels.partial_sums import SUM_OF_MANY, SUM_OF_MORE, SUM_PARTIALS, sum_partials, sum_tile

SHAPES = [(reading.splits, reading.columns) for reading in sums()]


@pytest.mark.parametrize(("splits", "columns"), dict.fromkeys(SHAPES), ids=str)
def test_the_tile_is_the_fastest_measured(splits: int, columns: int) -> None:
    read = {reading.tile: reading.us for reading in sums() if (reading.splits, reading.columns) == (splits, columns)}
    assert len(read) == 5
    assert read[sum_tile(splits, columns)] == min(read.values())


def test_up_to_32_partial_sums_have_one_tile() -> None:
    assert {sum_tile(splits, columns) for splits in (2, 4, 32) for columns in (1, 4224, 2**24)} == {SUM_PARTIALS}


@pytest.mark.parametrize(
    ("splits", "columns", "tile"),
    [
        *((splits, 70, SUM_PARTIALS) for splits in (1, 31, 32)),
        *((splits, 70, SUM_OF_MORE) for splits in (33, 64)),
        *((splits, 70, SUM_OF_MANY) for splits in (65, 128, 131, 300)),
        (70, 8300, SUM_OF_MORE),
    ],
    ids=str,
)
def test_every_tile_adds_all_partial_sums(splits: int, columns: int, tile: object, device: torch.device) -> None:
    assert sum_tile(splits, columns) == tile
    partial = torch.randint(-8, 9, (splits, columns), device=device).float()
    first = torch.full((columns - 3,), torch.nan, device=device)
    last = torch.full((3,), torch.nan, dtype=torch.bfloat16, device=device)
    sum_partials(partial, (first, last))
    expected = partial.sum(0)
    assert torch.equal(first, expected[:-3])
    assert torch.equal(last, expected[-3:].bfloat16())


@pytest.mark.parametrize("splits", [7, 50, 200])
def test_the_bits_are_the_same_every_time(splits: int, device: torch.device) -> None:
    partial = torch.randn(splits, 67, device=device)
    results = [torch.full((67,), torch.nan, device=device) for _ in range(2)]
    for result in results:
        sum_partials(partial, (result,))
    assert torch.equal(*results)
    assert torch.allclose(results[0], partial.sum(0), atol=1e-4)
