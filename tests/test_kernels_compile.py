"""The compiled kernels for sm_80, sm_90, sm_100 and gfx942: they fit, hardly spill, and use tensor cores."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from compile_kernels import GEMMS, SPILL_LIMIT, TARGETS, Compilation, NetworkCompilation, compilations, networks, table
from conftest import COMPILED

from mlp_fused.kernels.devices import PRODUCTS_OF_PARTS

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.alone  # a process that compiles on all cores

SAMPLE = compilations(full=False)
SAMPLED = set(SAMPLE)
REST = [row for row in compilations(full=True) if row not in SAMPLED]
NETWORKS = networks(full=False)
OTHER_NETWORKS = [row for row in networks(full=True) if row not in NETWORKS]


def run_script(*options: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # it takes time, and changes no instruction
    script = Path(__file__).with_name("compile_kernels.py")
    child = subprocess.run(
        [sys.executable, script, "--json", *options],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return [json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")]


def compiled(request: pytest.FixtureRequest, *options: str) -> dict[str, list[dict[str, Any]]]:
    """The readings by row id, which the summary also prints as a table. All workers share one compilation."""
    folder = request.getfixturevalue("tmp_path_factory").getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # all workers share this folder
    path = folder / f"compiled{''.join(options)}.json"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            path.write_text(json.dumps(run_script(*options)))
    readings = json.loads(path.read_text())
    request.config.stash.setdefault(COMPILED, []).extend(table(readings))
    by_id: dict[str, list[dict[str, Any]]] = {}
    for reading in readings:
        by_id.setdefault(reading["id"], []).append(reading)
    return by_id


@pytest.fixture(scope="module")
def sample(request: pytest.FixtureRequest) -> dict[str, list[dict[str, Any]]]:
    return compiled(request)


@pytest.fixture(scope="module")
def all_kernels(request: pytest.FixtureRequest) -> dict[str, list[dict[str, Any]]]:
    return compiled(request, "--full")


@pytest.fixture(scope="module")
def network_sample(request: pytest.FixtureRequest) -> dict[str, list[dict[str, Any]]]:
    return compiled(request, "--networks")


@pytest.fixture(scope="module")
def all_networks(request: pytest.FixtureRequest) -> dict[str, list[dict[str, Any]]]:
    return compiled(request, "--networks", "--full")


def check_row(row: Compilation, reading: dict[str, Any]) -> None:
    assert reading["shared"] <= reading["shared_limit"], reading
    assert reading["spills"] <= SPILL_LIMIT, reading
    if row.kernel not in GEMMS:
        return
    assert not row.tile.descriptors or reading["shared"] <= reading["counted"], reading
    assert reading["registers"] > 16, reading  # where tensor memory overflows, the compiler emits an empty kernel
    if row.target == "AMD MI300X":
        assert reading["mfma"] > 0, reading
        return
    tile = row.tile
    for instruction in ("wgmma", "tcgen05", "mma"):
        assert (reading[instruction] > 0) == (instruction == products(row)), reading
    # An A100 copies without TMA.
    assert (reading["tma"] > 0) == (tile.descriptors and row.target != "NVIDIA A100"), reading
    assert (reading["setmaxnreg"] > 0) == tile.warp_specialize, reading
    if row.target == "NVIDIA A100" and row.dtype != "float32" and row.aligned and tile.num_stages > 1:
        assert reading["cp_async"] > 0, reading


def products(row: Compilation) -> str | None:
    """The only instruction that multiplies; None if no tensor core does."""
    if row.dtype == "float32" and row.tile.precision in ("ieee", "redo"):
        return None
    whole = row.tile.block_m >= 64  # an instruction of the newer kinds multiplies 64 rows
    return {"NVIDIA H100": "wgmma", "NVIDIA B200": "tcgen05"}.get(row.target, "mma") if whole else "mma"


@pytest.mark.parametrize("row", SAMPLE, ids=lambda row: row.id)
def test_sampled_kernels(row: Compilation, sample: dict[str, list[dict[str, Any]]]) -> None:
    check_row(row, *sample[row.id])


def test_specialised_warps_are_not_ignored(sample: dict[str, list[dict[str, Any]]]) -> None:
    """If Triton follows the request, the loading warp gives registers to the other warps."""
    rows = [row for row in SAMPLE if row.tile.warp_specialize]
    assert {row.kernel for row in rows} == {"forward", "dgrad"}
    for row in rows:
        assert sample[row.id][0]["setmaxnreg"] > 0, row.id


# Instructions that multiply one block of the reduction, in the loop of an earlier form of these kernels (Triton 3.7.1
# for sm_90). In that form, each block of dz had one exponent. An H200 ran it at 174 to 193 TFLOP/s. A sketch, in which
# a whole row had one exponent, has 242 instructions, and 233 in wgrad's layout: it loads no exponents in the loop, and
# adds half as many sums outside the tensor cores. An H100 ran the sketch at 166 to 197 TFLOP/s.
INSTRUCTIONS = {"forward": 328, "dgrad": 330, "wgrad": 307}
# The products whose epilogues split their results, and the most words of a thread that they spill, outside the loop.
SPLITTING = {("forward", True): 0, ("dgrad", True): 12}


def test_planes_are_multiplied_without_conversions(sample: dict[str, list[dict[str, Any]]]) -> None:
    """A block of the reduction takes 12 wgmma and 3 waits, without spills, as in the form that was measured.

    The kernels now load an exponent for each row or column of dz. This may take 5 % more instructions. Nothing is
    converted to fp16 but the results that an epilogue splits.
    """
    rows = [row for row in SAMPLE if row.tile.precision == "fp16x3" and row.target == "NVIDIA H100"]
    assert {(row.kernel, row.splits) for row in rows} == {*((kind, False) for kind in GEMMS), *SPLITTING}
    for row in rows:
        (reading,) = sample[row.id]
        assert (reading["wgmma"], reading["waits"]) == (12, 3), reading
        assert reading["instructions"] <= 1.05 * INSTRUCTIONS[row.kernel], reading
        assert reading["spills"] <= (SPLITTING[row.kernel, True] if row.splits else 0), reading
        assert (reading["to_16_bits"] > 0) == row.splits, reading


# The same counts for one plane of each operand. The sketch with one plane has 106 and 115 instructions, because it adds
# all sums in the tensor cores.
INSTRUCTIONS_OF_ONE_PLANE = {"forward": 189, "dgrad": 208, "wgrad": 177}


def test_one_plane_takes_one_wait_for_each_block(sample: dict[str, list[dict[str, Any]]]) -> None:
    rows = [row for row in SAMPLE if row.tile.precision == "fp16x1" and row.target == "NVIDIA H100"]
    assert {row.kernel for row in rows} == set(GEMMS)
    for row in rows:
        (reading,) = sample[row.id]
        assert (reading["wgmma"], reading["waits"], reading["to_16_bits"], reading["spills"]) == (8, 1, 0, 0), reading
        assert reading["instructions"] <= 1.05 * INSTRUCTIONS_OF_ONE_PLANE[row.kernel], reading


def traits(row: Compilation) -> set[tuple[Any, ...]]:
    """The traits of a row: each of its fields and of its tile's, and the combinations that belong together."""
    tile = row.tile
    fields = [(field.name, getattr(part, field.name)) for part in (row, tile) for field in dataclasses.fields(part)]
    return {(name, value) for name, value in fields if name != "tile"} | {
        ("sides", tile.block_m, tile.block_n),
        ("products", row.kernel, row.target, row.dtype, tile.precision),
        ("loads", row.target, tile.descriptors, row.aligned),
        ("activation", row.kernel, row.activation),
    }


def test_the_sample_covers_every_trait() -> None:
    """Each kernel, target, dtype, precision, activation, output tile and option of a tile is in the default sample."""
    assert set[Any]().union(*map(traits, REST)) <= set[Any]().union(*map(traits, SAMPLE))


@pytest.mark.full
@pytest.mark.parametrize("row", REST, ids=lambda row: row.id)
def test_all_kernels(row: Compilation, all_kernels: dict[str, list[dict[str, Any]]]) -> None:
    check_row(row, *all_kernels[row.id])


def check_network(row: NetworkCompilation, readings: list[dict[str, Any]]) -> None:
    """Assert that few words spill. On Hopper, products of 64 rows must all be wgmma, with few waits."""
    if "reason" in readings[0]:
        assert not fits(row), readings
        return
    kernels = [reading["kernel"] for reading in readings]
    recompute = ["forward", "recompute", "sum_partials"]
    pair = ["forward", "dgrad", "wgrad", "sum_partials"]
    stored = ["forward", *(kernel for kernel in kernels if kernel == "stored"), "sum_partials"]
    assert kernels in ((["forward"],) if row.input else (recompute, pair, stored, pair + stored))
    for reading in readings:
        assert reading["shared"] <= reading["shared_limit"], reading
        assert reading["counted"] == 0 or reading["shared"] <= reading["counted"], reading
        if row.precision in PRODUCTS_OF_PARTS:
            # If wgrad recomputes gelu, it spills 10 words with tiles of 64 rows and none with 32.
            assert reading["spills"] <= (16 if reading["kernel"] == "wgrad" else 0), reading
            assert reading["kernel"] == "sum_partials" or (reading["wgmma"] > 0 and reading["mma"] == 0), reading
            assert -(-reading["registers"] // 8) * 8 * reading["threads"] <= 65536, reading
            # A product of 16 terms and 64 rows is one instruction.
            steps = PRODUCTS_OF_PARTS[row.precision] * row.widths[0] // 16
            assert reading["kernel"] not in ("forward", "dgrad") or reading["wgmma"] == 4 * steps, reading
        if row.dtype == "float32":
            continue  # its registers and instructions are reported, not bounded
        widest = max(row.widths[1:] if row.widths[0] > 256 else row.widths)
        assert reading["spills"] <= spill_limit(row, reading["kernel"], widest), reading
        if row.target == "NVIDIA H100" and row.input == row.dtype:
            # A multiprocessor has registers for all its programs at once.
            assert -(-reading["registers"] // 8) * 8 * reading["threads"] <= 65536, reading
        in_one_pass = reading["kernel"] in ("recompute", "stored")
        if row.target == "NVIDIA H100" and in_one_pass and widest >= 64:
            # Where the compiler serialises products, it waits for each wgmma. mma is allowed here: db may be a product
            # of 16 rows of ones with dz, and a wgmma takes 64 rows.
            assert 0 < reading["waits"] <= max(2, 0.35 * reading["wgmma"]), reading
        elif row.target == "NVIDIA H100" and (reading["kernel"] in ("forward", "dgrad") or min(row.widths) >= 64):
            assert reading["kernel"] == "sum_partials" or (reading["wgmma"] > 0 and reading["mma"] == 0), reading
        elif row.target == "NVIDIA B200" and reading["kernel"] in ("forward", "dgrad", "stored"):
            assert reading["tcgen05"] > 0, reading  # where tensor memory overflows, the compiler emits an empty kernel
        elif row.target == "AMD MI300X":
            assert reading["kernel"] == "sum_partials" or reading["mfma"] > 0, reading


def spill_limit(row: NetworkCompilation, kernel: str, widest: int) -> int:
    """Words that a kernel may spill.

    In one pass over 4 layers 64 wide, recomputed relu spilled 78 words without dx, and gelu over stored tensors up to
    46 (Triton 3.6, with dx). Both were the fastest on an H100 all the same. Today's relu spills 60 words, and 94 with
    inputs and outputs 16 wide. On a B200, 2 layers 64 wide spill 2 words (fp16, with dx). With Dropout, up to 62 words
    spill where a layer is 128 wide, and up to 6 in narrower networks (Triton 3.7).
    """
    if row.target == "NVIDIA H100" and widest == 64 and kernel in ("recompute", "stored"):
        return 96 if (kernel, row.activation) == ("recompute", "relu") else 48
    if row.target == "NVIDIA B200" and (kernel, widest) == ("recompute", 64):
        return 2
    if row.dropout:
        return 64 if widest > 64 else 8
    return 0 if widest <= 64 or kernel == "forward" else 32


def fits(row: NetworkCompilation) -> bool:
    """True if a network has to run as one kernel: in 16 bits, if the target can hold it."""
    held = sum(n * k for k, n in itertools.pairwise(row.widths)) * 2
    room = {"NVIDIA A100": 131072, "NVIDIA H100": 196608, "NVIDIA B200": 196608, "AMD MI300X": 49152}[row.target]
    return row.dtype != "float32" and held <= room and row.widths[0] <= 256


@pytest.mark.parametrize("row", NETWORKS, ids=lambda row: row.id)
def test_sampled_networks(row: NetworkCompilation, network_sample: dict[str, list[dict[str, Any]]]) -> None:
    check_network(row, network_sample[row.id])


def test_relu_is_part_of_the_rounding(network_sample: dict[str, list[dict[str, Any]]]) -> None:
    """A forward in 16 bits rounds and applies relu in one instruction, except on AMD GPUs and with Dropout."""
    rows = [row for row in NETWORKS if row.activation == "relu" and row.dtype != "float32"]
    forwards = [(row, reading) for row in rows for reading in network_sample[row.id] if reading["kernel"] == "forward"]
    assert {(row.target, row.dropout) for row, _ in forwards} == set(itertools.product(TARGETS, (False, True)))
    for row, reading in forwards:
        assert (reading.get("with_relu", 0) > 0) == (row.target != "AMD MI300X" and not row.dropout), (row.id, reading)


@pytest.mark.full
@pytest.mark.parametrize("row", OTHER_NETWORKS, ids=lambda row: row.id)
def test_all_networks(row: NetworkCompilation, all_networks: dict[str, list[dict[str, Any]]]) -> None:
    check_network(row, all_networks[row.id])
