"""The tasks of a tuning run, and their order."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlp_fused.engine import table_files
from mlp_fused.grid import ANCHORS, GRID, Workload
from mlp_fused.kernels import layer_tiles
from mlp_fused.kernels.devices import DEVICES, INTERPRETED_DEVICE
from mlp_fused.tune import tuner
from mlp_fused.tune.tasks import Product, Whole, list_tasks, products


def test_the_products_of_a_network() -> None:
    network_products = products(Workload((30, 20, 20, 10), 64, "bf16", "gelu"))
    assert len(network_products) == len({product.key for product in network_products}) == 9
    by_key = {(product.kind, product.width_in, product.width_out): product for product in network_products}
    assert by_key["forward", 30, 20].activation == "gelu"
    assert by_key["forward", 20, 10].activation == "identity"
    assert by_key["dgrad", 30, 20].activation == "identity"
    assert by_key["dgrad", 20, 10].activation == "gelu"
    assert sum(product.share for product in network_products) == pytest.approx(1)
    # Equal layers are measured once, with the costlier epilogue.
    alike = products(Workload((20, 20, 20), 64, "bf16", "gelu"))
    assert [(product.kind, product.activation) for product in alike] == [
        ("forward", "gelu"), ("dgrad", "gelu"), ("wgrad", "identity"),
    ]  # fmt: skip
    assert [product.share for product in alike] == pytest.approx([1 / 3] * 3)


def test_rows_that_descriptors_cannot_describe() -> None:
    (odd,) = {product.problem.aligned for product in products(Workload((33, 64), 64, "bf16"))}
    (even,) = {product.problem.aligned for product in products(Workload((40, 64), 64, "bf16"))}
    assert (odd, even) == (False, True)


def test_the_order_is_new_problems_then_anchors_then_flops() -> None:
    workloads = [Workload((8, 8, 600), 64, "fp32"), ANCHORS[0]]
    order = list_tasks(workloads, INTERPRETED_DEVICE)
    anchors = {product.key for product in products(ANCHORS[0])}
    assert {task.key for task in order[: len(anchors)]} == anchors
    for part in (order[: len(anchors)], order[len(anchors) :]):
        shares = [task.share for task in part]
        assert shares == sorted(shares, reverse=True)
    known = [order[0].key, order[3].key]
    retuned = list_tasks(workloads, INTERPRETED_DEVICE, known)
    assert [task.key for task in retuned[-2:]] == known
    assert sorted(map(str, retuned)) == sorted(map(str, order))


def test_narrow_networks_are_also_measured_as_one_kernel() -> None:
    wholes = [
        task for task in list_tasks([Workload((16,) * 4, 64, "bf16")], DEVICES["NVIDIA H200"]) if type(task) is Whole
    ]
    assert [task.training for task in wholes] == [True, False]
    wide = list_tasks([Workload((784, 512, 10), 64, "bf16")], DEVICES["NVIDIA H200"])
    assert {type(task) for task in wide} == {Product}


def test_a_table_can_hold_every_candidate_of_the_grid(tmp_path: Path) -> None:
    grid = {workload for family in GRID for workload in family.workloads}
    assert set(ANCHORS) <= grid
    for device in DEVICES.values():
        rows = {}
        for product in dict.fromkeys(product for workload in grid for product in products(workload)):
            for index, tile in enumerate(layer_tiles.candidates(product.problem, device)):
                kind, _, *rest = product.key
                row = table_files.Gemm(kind, 2 * index + 1, *rest, tile, 1.0, 1.0)
                rows[row.key] = row
        table = table_files.Table(device.name, "2026-01-31T12:00:00+00:00", tuner.versions(), tuple(rows.values()))
        table_files.write(tmp_path / "t.json", table)
        assert table_files.read(tmp_path / "t.json") == table
