"""The grid of networks that the benches and the tuner measure."""

from __future__ import annotations

from collections import Counter

from mlp_fused.grid import ANCHORS, GRID, Workload


def test_the_grid_has_each_network_once_and_the_anchors() -> None:
    counts = Counter(workload for family in GRID for workload in family.workloads)
    assert set(counts.values()) == {1}
    assert set(ANCHORS) <= set(counts)
    assert len(ANCHORS) == len(set(ANCHORS))


def test_a_family_has_every_combination_in_the_order_of_its_fields() -> None:
    family = next(family for family in GRID if family.name == "middle")
    assert family.workloads[:3] == [
        Workload((256,) * 5, 4096, "bf16", "relu"),
        Workload((256,) * 5, 4096, "bf16", "gelu"),
        Workload((256,) * 5, 16384, "bf16", "relu"),
    ]
    assert len(family.workloads) == 3 * 3 * 2
