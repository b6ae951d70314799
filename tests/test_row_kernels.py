"""The kernels that a row of a measured table was measured with, and rows of older kernels."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from table_rows import FORWARD, H200, NARROW, OTHER, TILE, estimated, install, outdated, problem, table

from mlp_fused import FusedMLP
from mlp_fused.engine import row_kernels, tables
from mlp_fused.engine.row_kernels import current_digest, holds, is_outdated, stamped
from mlp_fused.engine.table_files import Gemm, Network
from mlp_fused.kernels import layer_tiles, sources

FP32 = dataclasses.replace(FORWARD, dtype="float32", tile=dataclasses.replace(TILE, precision="bf16x6"))
BY_PLANES = dataclasses.replace(FP32, tile=dataclasses.replace(TILE, precision="fp16x3"), planes_ms=1.0)
UNMEASURED = {"pointwise_kernel"}  # a kernel without rows: it is part of a product by torch


def test_rows_with_different_kernels_have_different_digests() -> None:
    digests = {
        "forward": current_digest(FORWARD),
        "gelu": current_digest(dataclasses.replace(FORWARD, activation="gelu")),
        "dgrad": current_digest(dataclasses.replace(FORWARD, kind="dgrad")),
        "wgrad": current_digest(dataclasses.replace(FORWARD, kind="wgrad", activation="identity")),
        "bf16x6": current_digest(FP32),
        "bf16x6, faster than planes": current_digest(dataclasses.replace(FP32, planes_ms=1.0)),
        "planes": current_digest(BY_PLANES),
        "training": current_digest(NARROW),
        "inference": current_digest(dataclasses.replace(NARROW, training=False)),
    }
    assert len(set(digests.values())) == len(digests)


def test_rows_with_the_same_kernel_have_the_same_digest() -> None:
    others = {"rows": 1, "width_out": 8, "tile": None, "ms": 1.0, "dtype": "float16"}
    for name, value in others.items():
        assert current_digest(dataclasses.replace(FORWARD, **{name: value})) == current_digest(FORWARD)
    # A row of fp32 without a tile does not say how its product was multiplied, so its digest covers every way
    # that was measured.
    assert current_digest(dataclasses.replace(FP32, tile=None)) == current_digest(FP32)


@pytest.mark.parametrize("row", [FORWARD, NARROW], ids=["product", "network"])
def test_a_row_is_valid_while_its_kernels_are_unchanged(row: Gemm | Network) -> None:
    now = stamped(row)
    assert (is_outdated(now), holds(now)) == (False, True)
    for kernel in (None, "0" * 16):
        older = dataclasses.replace(row, kernel=kernel)
        assert (is_outdated(older), holds(older)) == (True, False)


def test_torch_stays_the_choice_until_a_newer_kernel_is_measured() -> None:
    for row in (dataclasses.replace(FORWARD, tile=None), dataclasses.replace(NARROW, path="torch")):
        assert is_outdated(row)
        assert holds(row)


def test_every_kernel_belongs_to_some_row() -> None:
    """A new kernel in a module belongs to the rows of that module automatically."""
    every = {name for _, name in sources.kernels_in("*")}
    products = {name for kernels in row_kernels.PRODUCTS.values() for _, name in kernels}
    by_planes = {name for kernels in row_kernels.BY_PLANES.values() for _, name in kernels}
    networks = {name for module in row_kernels.TRAINING for _, name in sources.kernels_in(module)}
    assert {"network_forward_kernel", "network_dgrad_kernel", "dgrad_kernel"} <= networks
    assert products <= networks
    assert every - networks - by_planes <= UNMEASURED
    assert len(by_planes) == 5


def test_a_row_of_an_older_kernel_is_not_used_and_the_source_says_so(
    table_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    current = dataclasses.replace(FORWARD, rows=2**14, tile=OTHER)
    install(user=table(outdated(FORWARD), outdated(NARROW), current))
    with caplog.at_level(logging.WARNING, "mlp_fused"):
        choice = tables.choice_for(problem(), H200)
    assert choice.tile == estimated(problem())
    assert choice.source == f"estimated; measured on {H200.name} with an older kernel"
    assert tables.choice_for(problem(2**14), H200) == tables.Choice(OTHER, f"measured on {H200.name}")
    asked = ((64, 64, 64), torch.float16, "ieee", "relu", True, H200)
    assert tables.path_for(*asked) is None
    assert tables.path_for(*asked, outdated=True) == NARROW.path
    (record,) = caplog.records
    message = "2 rows were measured with older kernels, and not used; `mlp-fused tune` measures again"
    assert record.getMessage() == f"{tables.user_path(H200.name)}: {message}"


def test_the_packaged_table_replaces_an_older_row(table_folder: Path) -> None:
    install(user=table(outdated(FORWARD)), packaged=table(dataclasses.replace(FORWARD, tile=OTHER), NARROW))
    assert tables.choice_for(problem(), H200) == tables.Choice(OTHER, f"measured on {H200.name}")
    assert tables.path_for((64, 64, 64), torch.float16, "ieee", "relu", True, H200) == NARROW.path


def test_torch_runs_if_no_newer_kernel_was_measured(table_folder: Path) -> None:
    torchs = dataclasses.replace(FORWARD, tile=None)
    network = dataclasses.replace(NARROW, path="torch")
    install(table(outdated(torchs), outdated(network)))
    choice = tables.choice_for(problem(), H200)
    assert choice == tables.Choice(None, f"measured on {H200.name} with an older kernel")
    assert tables.path_for((64, 64, 64), torch.float16, "ieee", "relu", True, H200) == "torch"
    install(table(outdated(torchs), dataclasses.replace(FORWARD, rows=2000)))
    assert tables.tile_for(problem(2000), H200) == TILE


def test_a_row_without_a_kernel_digest_counts_as_older(table_folder: Path) -> None:
    written = dataclasses.replace(table(), gemms=(outdated(FORWARD, None),))
    install(written)
    assert tables.choice_for(problem(), H200).source.endswith("with an older kernel")


def test_a_related_gpus_row_of_an_older_kernel_is_not_used(table_folder: Path) -> None:
    size = {"arch": H200.arch, "multiprocessors": H200.multiprocessors}
    wide = Gemm("forward", 8192, 4096, 4096, "bfloat16", "ieee", "relu", TILE, 1.0, 2.0)
    tile = layer_tiles.candidates(wide.problem, H200)[-1]
    row = dataclasses.replace(wide, tile=tile)
    for installed, expected in ((row, tile), (outdated(row), estimated(wide.problem))):
        install(packaged=dataclasses.replace(table(installed, device="NVIDIA H100 80GB HBM3"), **size))
        assert tables.tile_for(wide.problem, H200) == expected


def test_explain_says_that_a_reading_has_an_older_kernel(table_folder: Path) -> None:
    wide = dataclasses.replace(FORWARD, activation="identity")
    install(table(outdated(wide), outdated(NARROW)))
    network = FusedMLP(64, [64, 64]).explain(4096, dtype=torch.float16, device=H200.name)
    assert network.reason.endswith("; its measurement is not used, because the kernels have changed since")
    asked = FusedMLP(64, [64, 64], recompute=False).explain(4096, dtype=torch.float16, device=H200.name)
    assert "older" not in asked.reason
    rows = str(FusedMLP(256, [512]).explain(1024, dtype=torch.bfloat16, device=H200.name)).splitlines()
    (row,) = [row for row in rows if "256 -> 512  forward" in row]
    assert row.endswith(f"estimated; measured on {H200.name} with an older kernel")
