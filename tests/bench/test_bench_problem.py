"""The grid of the benches: its cells, their ids and their order."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from bench.problem import ANCHORS, FAMILIES, GRID, NETWORK_PHASES, PHASES, Cell, cases, select


def test_ids_are_unique_and_name_every_field() -> None:
    assert len({str(cell) for cell in GRID}) == len(GRID)
    assert str(GRID[0]) == "seed-784x512x512x10-relu-fp32-m256-step"
    assert "odd-256x512x256-gelu-bf16-m16384-sliced-forward" in map(str, GRID)


def test_each_family_has_an_anchor_and_anchors_come_first_in_the_families_order() -> None:
    assert [str(cell) for cell in GRID if cell.anchor] == [str(cell) for cell in GRID[: len(ANCHORS)]] == list(ANCHORS)
    assert list(dict.fromkeys(cell.family for cell in GRID[: len(ANCHORS)])) == list(FAMILIES)
    rest = [cell.family for cell in GRID[len(ANCHORS) :]]
    assert rest == sorted(rest, key=FAMILIES.index)


def test_phases_of_a_problem_are_adjacent() -> None:
    rest = [(cell.family, cell.problem) for cell in GRID[len(ANCHORS) :]]
    changes = sum(a != b for a, b in pairwise(rest))
    assert changes + 1 == len(set(rest))


def test_every_cell_has_a_known_phase_and_family() -> None:
    assert {cell.phase for cell in GRID} == set(PHASES)
    assert {cell.family for cell in GRID} == set(FAMILIES)


def test_the_copy_family_has_every_input_of_the_grid_in_32_and_16_bits() -> None:
    def inputs(cells: list[Cell]) -> set[tuple[object, ...]]:
        return {(cell.problem.widths[0], cell.problem.rows, cell.problem.layout) for cell in cells}

    copied = [cell for cell in GRID if cell.phase == "copy"]
    assert inputs(copied) == inputs([cell for cell in GRID if cell.family in NETWORK_PHASES])
    assert Counter(cell.problem.dtype for cell in copied) == {"fp32": len(copied) // 2, "bf16": len(copied) // 2}


def test_gemms_are_the_distinct_products_of_the_networks() -> None:
    expected_ids = {f"{cell.problem}-{cell.phase}" for cell in select("gemm-*-bf16-m8192-*")}
    assert expected_ids == {
        f"{layer}-bf16-m8192-{phase}"
        for k, n in ((4096, 16384), (1024, 4096))
        for layer, phase in (
            (f"{k}x{n}-gelu", "layer_forward"),
            (f"{k}x{n}-gelu", "layer_forward_z"),
            (f"{k}x{n}-identity", "wgrad"),
            (f"{n}x{k}-identity", "layer_forward"),
            (f"{n}x{k}-gelu", "dgrad"),
            (f"{n}x{k}-identity", "wgrad"),
        )
    }
    for family in ("seed", "middle", "large"):
        for network in {cell.problem for cell in GRID if cell.family == family}:
            for k, n in pairwise(network.widths):
                (_,) = select(f"gemm-{k}x{n}-*-{network.dtype}-m{network.rows}-wgrad")


def test_select() -> None:
    assert select() == list(GRID)
    assert {cell.phase for cell in select("narrow-*-forward")} == {"forward"}
    with pytest.raises(ValueError, match="no cell of the grid matches 'nothing'"):
        select("nothing")


def test_copies_are_for_a_gpu_only() -> None:
    assert {(cell.phase, device) for cell, device in cases("copy")} == {
        ("copy", "cuda"),
        ("first_touch", "cuda"),
        ("lecture", "cpu"),
        ("lecture", "cuda"),
    }
