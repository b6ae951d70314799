"""Tiles and paths, decided without a GPU; FLOPs, bytes and floors."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlp_fused import ACTIVATIONS, FusedMLP, explain
from mlp_fused.engine import network_path, paths, settings, table_files, tables
from mlp_fused.engine.row_kernels import stamped
from mlp_fused.engine.schedule import Step
from mlp_fused.kernels import devices, layer_tiles, network_tiles, tile_config
from mlp_fused.kernels.activations import IDENTITY
from mlp_fused.kernels.devices import DEVICES, Device, device_slug
from mlp_fused.kernels.launch import count_launches
from mlp_fused.kernels.layer_tiles import candidates, choose, why_torch
from mlp_fused.kernels.tile_config import Problem
from mlp_fused.reference import Layer
from mlp_fused.tune import config, tasks

H200 = DEVICES["NVIDIA H200"]

PROBLEMS = st.builds(
    Problem,
    st.sampled_from(["forward", "dgrad", "wgrad", "output_gradient"]),
    st.integers(1, 2**22),
    st.integers(1, 20000),
    st.integers(0, 2**22),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from(["ieee", "tf32"]),
    st.booleans(),
)


@given(PROBLEMS, st.sampled_from(list(DEVICES.values())))
def test_every_candidate_is_a_tile_that_can_run(problem: Problem, device: Device) -> None:
    tiles = candidates(problem, device)
    assert choose(problem, device) is tiles[0]
    assert len(set(tiles)) == len(tiles)
    for tile in tiles:
        sides = [tile.block_m, tile.block_n // tile.parts] + ([tile.block_k] if tile.block_k else [])
        for side in sides:
            assert side >= 16
            assert side & (side - 1) == 0
        assert (tile.block_k > 0) == (problem.kind != "output_gradient")
        assert tile.split == 1 or problem.kind == "wgrad"
        assert tile.split * tile.block_k <= max(tile.block_k, problem.k)
        if tile.block_k:
            assert tile_config.shared_memory(problem, tile, device) <= device.shared_memory
        # A persistent kernel starts one or two programs per multiprocessor.
        assert tile.programs in (0, device.multiprocessors, 2 * device.multiprocessors)
        if tile.descriptors:
            assert problem.aligned
            assert device.arch in (90, 100)
            assert tile.programs
        if tile.precision == "bf16x6":
            assert problem.dtype == torch.float32
            assert problem.precision == "ieee"
            assert problem.k >= layer_tiles.SHORTEST_SPLIT


def test_the_rule_picks_tiles_for_the_device() -> None:
    """Tiles are large if they fill the device and smaller otherwise. Rows are split if there are few tiles."""
    large, small = (choose(Problem("forward", m, 4096, 4096, torch.bfloat16), H200) for m in (8192, 256))
    assert large.block_m * large.block_n > small.block_m * small.block_n
    tall = choose(Problem("wgrad", 512, 512, 2**20, torch.bfloat16), H200)
    assert tall.split > 1
    assert choose(Problem("wgrad", 8192, 8192, 2**20, torch.bfloat16), H200).split == 1
    full, allowed = (choose(Problem("forward", 8192, 4096, 4096, torch.float32, p), H200) for p in ("ieee", "tf32"))
    assert (full.precision, allowed.precision) == ("bf16x6", "tf32")
    short = choose(Problem("forward", 8192, 4096, layer_tiles.SHORTEST_SPLIT - 1, torch.float32), H200)
    assert short.precision == "ieee"
    assert not choose(Problem("forward", 8192, 4096, 4096, torch.bfloat16, aligned=False), H200).descriptors


def test_an_unknown_device_gets_the_tiles_of_its_architecture() -> None:
    unknown = dataclasses.replace(H200, name="NVIDIA GH200", tensor_16=None, tensor_tf32=None, fma_32=None)
    for problem in (Problem("forward", 8192, 4096, 4096, dtype) for dtype in (torch.bfloat16, torch.float32)):
        assert choose(problem, unknown) == choose(problem, H200)


def rule_for_the_grid() -> str:
    """A line for each product of the grid on each device: the rule's tile, and whether torch is expected to be faster.

    Narrow networks are not listed, because they are one kernel.
    """
    workloads = [w for family in config.GRID for w in family.workloads if max(w.widths) > 128]
    products = dict.fromkeys(product for workload in workloads for product in tasks.products(workload))
    problems = dict.fromkeys(product.problem for product in products)
    lines = []
    for device in {device.arch: device for device in DEVICES.values()}.values():  # one device per architecture
        for problem in problems:
            size, dtype = f"{problem.m}x{problem.n}x{problem.k}", str(problem.dtype).removeprefix("torch.")
            by = "torch, else " if why_torch(problem, device) else ""
            lines.append(
                f"{device.name}: {problem.kind} {size} {dtype} {problem.activation}: {by}{choose(problem, device)}\n"
            )
    return "".join(lines)


def test_the_rule_for_the_grid_is_unchanged() -> None:
    """After an intended change, run `python tests/test_paths.py > tests/data/rule.txt` and read the difference."""
    assert rule_for_the_grid() == (Path(__file__).parent / "data" / "rule.txt").read_text()


def network(
    widths: tuple[int, ...],
    activation: str = "relu",
    dtype: torch.dtype = torch.bfloat16,
    device: str = "NVIDIA H200",
    precision: str = "ieee",
    training: bool = True,
    recompute: bool | None = None,
    torch_too: bool = False,
) -> network_path.NetworkPath | str:
    """The network path for contiguous parameters."""
    activations = (ACTIVATIONS[activation],) * (len(widths) - 2) + (ACTIVATIONS["identity"],)
    strides = tuple((k, 1, 1) for k in widths[:-1])
    return paths.network_path(
        widths, strides, activations, dtype, precision, DEVICES[device], training, recompute, torch_too=torch_too
    )


@pytest.mark.parametrize(
    ("widths", "activation", "formulation"),
    [
        ((16,) * 5, "relu", "recompute"),
        ((16,) * 7, "gelu", "recompute"),
        ((32,) * 5, "relu", "recompute"),
        ((32,) * 5, "gelu", "recompute"),
        ((32,) * 7, "gelu", "stored"),
        ((64,) * 3, "gelu", "recompute"),
        ((64,) * 4, "relu", "recompute"),
        ((64,) * 5, "relu", "recompute"),
        ((64,) * 5, "gelu", "stored"),
        ((64,) * 6, "relu", "stored"),
        ((16, 64, 64, 16), "relu", "recompute"),
        ((128,) * 5, "relu", "stored"),
        ((128, 64, 64, 64, 64, 64, 3), "relu", "stored"),
        ((784, 64, 64, 10), "relu", "stored"),
        ((784, 256, 10), "relu", "stored"),
        ((128,) * 7, "gelu", "stored"),
        ((128,) * 8, "gelu", None),
        ((512, 512, 10), "relu", None),
        ((64, 64, 300), "relu", None),
    ],
    ids=str,
)
def test_the_formulation_of_training_on_hopper(
    widths: tuple[int, ...], activation: str, formulation: str | None
) -> None:
    path = network(widths, activation)
    if formulation is None:
        assert path in ("a width is over 256", "the weights and a tile of rows do not fit in shared memory")
        return
    assert isinstance(path, network_path.NetworkPath)
    assert path.formulation == formulation
    assert ("one pass fits in registers and moves" in path.reason) == (formulation == "recompute")
    inference = network(widths, activation, training=False)
    assert isinstance(inference, network_path.NetworkPath)
    assert inference.formulation is None
    for which, stores in ((path, formulation == "stored"), (inference, False)):
        problem = network_tiles.NetworkProblem(
            "forward", which.network.pads, which.network.saves_z, torch.bfloat16, stores=stores
        )
        assert which.forward_tile == network_tiles.network_tile(problem, H200)


def form(path: network_path.NetworkPath | str) -> str:
    """The form of a path's backward, by its name in tests/data/h100/narrow.jsonl."""
    assert isinstance(path, network_path.NetworkPath)
    if path.formulation == "recompute":
        return "recompute"
    launches = len(path.groups)
    return "dgrad and wgrad" if not launches else "one launch" if launches == 1 else f"{launches} launches"


def test_the_backward_has_the_fastest_measured_form_on_a_hopper() -> None:
    lines = (Path(__file__).parent / "data" / "h100" / "narrow.jsonl").read_text().splitlines()
    readings: dict[tuple[tuple[int, ...], str, str], dict[str, float]] = {}
    for row in map(json.loads, lines):
        key = (tuple(row["widths"]), row["activation"], row["dtype"])
        readings.setdefault(key, {})[row["form"]] = row["train"]
    assert len(readings) == 5
    for (widths, activation, dtype), train in readings.items():
        path = network(widths, activation, getattr(torch, dtype), "NVIDIA H100")
        assert form(path) == min(train, key=lambda form: train[form]), (widths, activation)


@pytest.mark.parametrize(
    ("widths", "activation", "groups"),
    [
        ((64,) * 5, "gelu", ((0, 4),)),
        ((64,) * 7, "relu", ((2, 6), (0, 2))),
        ((64,) * 7, "gelu", ((3, 6), (0, 3))),
        ((128,) * 4, "relu", ((2, 3), (1, 2), (0, 1))),
        ((128, 64, 64, 64), "relu", ((0, 3),)),
        ((40, 128, 128, 10), "relu", ((2, 3), (1, 2), (0, 1))),
        ((784, 64, 64, 10), "relu", ()),  # its first layer is streamed
        ((64, 256, 64), "relu", ()),
        ((32,) * 9, "relu", ()),
    ],
    ids=str,
)
def test_layers_whose_sums_fit_share_a_launch(
    widths: tuple[int, ...], activation: str, groups: tuple[tuple[int, int], ...]
) -> None:
    path = network(widths, activation, recompute=False)
    assert isinstance(path, network_path.NetworkPath)
    assert path.groups == groups


def test_one_pass_over_stored_tensors_is_chosen_only_where_measured() -> None:
    """With backend="triton" it runs on a Blackwell too. Other devices have no tile for it."""
    activations = (ACTIVATIONS["gelu"],) * 3 + (ACTIVATIONS["identity"],)
    launches = {}
    for name, device in DEVICES.items():
        for torch_too in (True, False):
            path = paths.network_path(
                (64,) * 5, ((64, 1, 1),) * 4, activations, torch.bfloat16, "ieee", device, True, torch_too=torch_too
            )
            assert isinstance(path, network_path.NetworkPath)
            launches[name, torch_too] = len(path.groups)
    assert launches == {
        ("NVIDIA A100", True): 0, ("NVIDIA A100", False): 0, ("NVIDIA H100", True): 1, ("NVIDIA H100", False): 1,
        ("NVIDIA H200", True): 1, ("NVIDIA H200", False): 1, ("NVIDIA B200", True): 0, ("NVIDIA B200", False): 1,
        ("AMD MI300X", True): 0, ("AMD MI300X", False): 0,
    }  # fmt: skip


def test_full_fp32_is_one_kernel_up_to_64_wide() -> None:
    assert isinstance(network((64,) * 5, dtype=torch.float32), network_path.NetworkPath)
    assert network((128,) * 3, dtype=torch.float32) == "full fp32 products wider than 64 do not fit in registers"
    assert isinstance(network((128,) * 3, dtype=torch.float32, precision="tf32"), network_path.NetworkPath)


@pytest.mark.parametrize(
    ("width", "precision", "training", "device", "automatic"),
    [
        (64, "ieee", True, "NVIDIA H100", True),
        (64, "ieee", False, "NVIDIA H100", True),
        (64, "tf32", False, "NVIDIA H100", True),
        (64, "tf32", True, "NVIDIA H100", False),
        (32, "ieee", True, "NVIDIA H100", True),
        (32, "tf32", False, "NVIDIA H100", False),
        (64, "ieee", True, "NVIDIA A100", False),
        (64, "ieee", True, "NVIDIA B200", False),
    ],
)
def test_a_float32_network_is_one_kernel_if_measured_faster(
    width: int, precision: str, training: bool, device: str, automatic: bool
) -> None:
    """A forward was 4.2 times faster, training 2.4 (tests/data/h200). Other devices need backend="triton"."""
    requested, automatic_path = (
        network((width,) * 5, "relu", torch.float32, device, precision, training, torch_too=torch_too)
        for torch_too in (False, True)
    )
    assert isinstance(requested, network_path.NetworkPath)
    assert (automatic_path == paths.UNMEASURED_FLOAT32) != automatic
    parts = {"ieee": "fp16x3", "tf32": "fp16x1"} if device == "NVIDIA H100" else {}
    assert requested.network.precision == parts.get(precision, precision)
    assert ("two scaled fp16 parts" in requested.explanation) == (requested.network.precision == "fp16x3")


def test_the_user_and_a_measured_table_override_the_rule(table_folder: Path) -> None:
    narrow, wide = (32,) * 5, (128,) * 5
    formulations = {}
    for recompute in (True, False):
        for widths in (narrow, wide):
            path = network(widths, recompute=recompute)
            assert isinstance(path, network_path.NetworkPath)
            assert path.reason == "the user asks for it"
            formulations[widths, recompute] = path.formulation
    assert formulations == {
        (narrow, True): "recompute", (narrow, False): "stored", (wide, True): "rerun", (wide, False): "stored",
    }  # fmt: skip

    def row(width: int, path: str, training: bool = True, rows: int = 4096) -> table_files.Network:
        return stamped(table_files.Network((width,) * 5, rows, "bfloat16", "ieee", "relu", training, path, {path: 1.0}))

    rows = (
        row(32, "recompute"), row(32, "stored", rows=8192), row(16, "layer"), row(16, "layer", training=False),
        row(8, "torch"),
    )  # fmt: skip
    table = table_files.Table("NVIDIA H200", "2026-01-31T12:00:00+00:00", VERSIONS, (), rows)
    table_files.write(tables.packaged_path("NVIDIA H200"), table)
    paths.forget_tables()
    stored = network(narrow)
    assert isinstance(stored, network_path.NetworkPath)
    assert (stored.formulation, stored.reason) == ("stored", "it is faster as measured on this device")
    assert network((16,) * 5) == network((16,) * 5, training=False) == "it is faster as measured on this device"
    asked = network((16,) * 5, recompute=True)
    assert isinstance(asked, network_path.NetworkPath)
    assert asked.formulation == "recompute"
    for others in ({"device": "NVIDIA H100"}, {"activation": "tanh"}, {"dtype": torch.float16}):
        other = network(narrow, **others)  # type: ignore[arg-type]
        assert isinstance(other, network_path.NetworkPath)
        assert other.formulation == "recompute"
    with_triton = network((8,) * 5)  # the rule applies if torch was faster and kernels are requested
    assert isinstance(with_triton, network_path.NetworkPath)
    assert with_triton.formulation == "recompute"


VERSIONS = {"mlp_fused": "0", "python": "3", "torch": "2", "triton": "3", "cuda": "13", "driver": "580"}


def test_torch_runs_if_measured_faster_and_explain_says_so(table_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the interpreter's device as if "auto" ran kernels on it."""
    device = devices.INTERPRETED_DEVICE
    networks = [
        table_files.Network((8, 8, 8), 64, "float32", "ieee", "relu", training, "torch", {"torch": 1.0, other: 2.0})
        for training, other in ((True, "stored"), (False, "network"))
    ]
    tile = choose(Problem("forward", 64, 20, 300, torch.float32), device)
    gemms = [
        table_files.Gemm("forward", 64, 300, 300, "float32", "ieee", "relu", None, 2.0, 1.0),
        table_files.Gemm("forward", 64, 20, 300, "float32", "ieee", "identity", tile, 1.0, 2.0),
    ]
    rows = tuple(map(stamped, gemms)), tuple(map(stamped, networks))
    table = table_files.Table(device.name, "2026-01-31T12:00:00+00:00", VERSIONS, *rows)
    table_files.write(tables.user_path(device.name), table)
    paths.forget_tables()
    monkeypatch.setattr(paths, "why_device", lambda device, backend: None)
    monkeypatch.setattr(devices, "describe", lambda kind, index=0: device)
    x = torch.randn(5, 8)

    def launched(model: FusedMLP) -> bool:
        model._wants_kernels = lambda: True  # so that it makes a plan on a CPU
        with count_launches() as launches:
            model(x).sum().backward()
            with torch.no_grad():
                model(x)
        return bool(launches)

    sentence = "torch is faster as measured on this device"
    for recompute in (None, True, False):
        assert launched(FusedMLP(8, [8, 8], recompute=recompute)) == (recompute is not None)
    assert launched(FusedMLP(8, [8, 8], backend="triton"))
    assert launched(FusedMLP(8, [8, 8], activation_layer="tanh"))
    layers = [Layer(torch.randn(8, 8), None, ACTIVATIONS["relu"]), Layer(torch.randn(8, 8), None, IDENTITY)]
    assert paths.why_reference(x, layers, torch.float32, "auto") == sentence
    assert paths.why_reference(x, layers, torch.float32, "auto", True) is None

    monkeypatch.setattr(devices, "DEVICES", {device.name: device})
    explained = FusedMLP(8, [8, 8]).explain(5, device=device.name)
    assert (explained.path, explained.reason) == ("reference", sentence)
    assert FusedMLP(8, [8, 8], backend="triton").explain(5, device=device.name).path == "network"
    rows = str(FusedMLP(300, [300, 20]).explain(64, device=device.name)).splitlines()
    (first,) = [row for row in rows if "300 -> 300  forward" in row]
    assert "torch's own" in first
    assert first.endswith(f"measured on {device.name}")
    assert "torch's own" not in str(FusedMLP(300, [300, 20], backend="triton").explain(64, device=device.name))
    (second,) = [row for row in rows if "300 -> 20 " in row and "forward" in row]
    assert str(tile) in second
    assert second.endswith(f"measured on {device.name}")
    (third,) = [row for row in rows if "300 -> 20 " in row and "wgrad" in row]
    assert third.endswith("estimated")


@given(
    st.lists(st.integers(1, 300), min_size=2, max_size=9),
    st.sampled_from(["relu", "gelu"]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.sampled_from(list(DEVICES)),
    st.booleans(),
    st.sampled_from([None, True, False]),
)
def test_a_network_has_a_path_or_a_reason(
    widths: list[int], activation: str, dtype: torch.dtype, device: str, training: bool, recompute: bool | None
) -> None:
    path = network(tuple(widths), activation, dtype, device, training=training, recompute=recompute)
    if isinstance(path, str):
        assert path
        return
    assert (path.formulation is None) == (not training)
    assert (path.backward_tile is None) == (not training)
    problem = network_tiles.NetworkProblem("forward", path.network.pads, path.network.saves_z, dtype)
    assert (
        network_tiles.network_shared_memory(problem, path.forward_tile, DEVICES[device])
        <= DEVICES[device].shared_memory
    )
    assert path.forward_tile.programs >= DEVICES[device].multiprocessors
    if recompute and training:
        x = torch.empty(7, widths[0], dtype=dtype, device="meta")
        layers = explain.meta_layers(widths, path.activations, dtype)
        _, _, saved_bytes = explain.make_schedules(path, x, layers, DEVICES[device])
        assert saved_bytes == 7 * widths[0] * dtype.itemsize


def list_steps(path: network_path.NetworkPath, widths: tuple[int, ...], needs_x: bool) -> list[Step]:
    """All steps of a training pass over 1000 rows."""
    x = torch.empty(1000, widths[0], dtype=torch.bfloat16, device="meta", requires_grad=needs_x)
    layers = explain.meta_layers(widths, path.activations, torch.bfloat16)
    forwards, backwards, _ = explain.make_schedules(path, x, layers, H200)
    return [step for schedule in (*forwards, *backwards) for step in schedule.steps]


def test_work_of_a_network_counts_memory_traffic() -> None:
    """Compare with counts by hand for 64 -> 64 -> 64 -> 16 in bf16 with relu: recomputing, storing, and inference."""
    M, d, last = 1000, 64, 16
    weights = 2 * (d * d + d) + last * d + last
    products = [2 * M * d * d, 2 * M * d * d, 2 * M * d * last]
    path = network((d, d, d, last), device="NVIDIA A100")
    assert isinstance(path, network_path.NetworkPath)
    assert path.formulation == "stored"
    forward, dgrad, wgrad, _ = list_steps(path, (d, d, d, last), needs_x=False)
    hidden = 2 * M * d
    assert forward.work == explain.Work(sum(products), 2 * (M * d + M * last + weights + hidden))
    matrices = d * d + last * d  # the weights of all layers but the first
    assert dgrad.work == explain.Work(sum(products[1:]), 2 * (M * last + hidden + hidden + matrices))
    assert wgrad.work == explain.Work(sum(products), 2 * (M * d + hidden + hidden + M * last + weights))
    in_one_pass = network((d, d, d, last), recompute=False)
    assert isinstance(in_one_pass, network_path.NetworkPath)
    forward, backward, _ = list_steps(in_one_pass, (d, d, d, last), needs_x=False)
    assert forward.work == explain.Work(sum(products), 2 * (M * d + M * last + weights + hidden))
    # x, h, dy and all weights but the first are read, the gradients are written
    moved = M * d + hidden + M * last + matrices + weights
    assert backward.work == explain.Work(sum(products) + sum(products[1:]), 2 * moved)
    by_layers = network((2 * d,) * 3, recompute=False)
    assert isinstance(by_layers, network_path.NetworkPath)
    _, upper, lower, _ = list_steps(by_layers, (2 * d,) * 3, needs_x=True)
    # h and dy read, dz written; then x and dz read, dx written
    for step in (upper, lower):
        matrix = (2 * d) ** 2
        assert step.work == explain.Work(2 * 2 * M * matrix, 2 * (3 * M * 2 * d + 2 * matrix + 2 * d))
    recomputing = network((d, d, d))
    assert isinstance(recomputing, network_path.NetworkPath)
    forward, recompute, _ = list_steps(recomputing, (d, d, d), needs_x=True)
    weights = 2 * (d * d + d)
    assert forward.work == explain.Work(2 * products[0], 2 * (2 * M * d + weights))
    # recomputes one layer, then dgrad and wgrad of both; x, dy, dx, the weights and their gradients
    assert recompute.work == explain.Work(5 * products[0], 2 * (3 * M * d + 2 * weights))
    by_width = explain.work(M, (d, d, d), torch.bfloat16, device=H200)
    assert by_width["inference"] == by_width["forward"] == forward.work
    assert by_width["backward"] == explain.Work(4 * products[0], 2 * (2 * M * d + 2 * weights))


def test_the_file_name_of_a_device() -> None:
    assert device_slug("NVIDIA H200") == "nvidia_h200"
    assert device_slug("NVIDIA A100-SXM4-80GB") == "nvidia_a100_sxm4_80gb"
    assert device_slug("AMD Instinct MI300X (gfx942)") == "amd_instinct_mi300x_gfx942"


def test_work_counts_every_tensor_once() -> None:
    """Compare with counts by hand for 784 -> 512 -> 10 in bf16 with gelu."""
    M, d0, d1, d2 = 64, 784, 512, 10
    work = explain.work(M, [d0, d1, d2], torch.bfloat16, "gelu")
    weights = d1 * d0 + d1 + d2 * d1 + d2
    layers = (M * d0 + M * d1) + (M * d1 + M * d2)
    assert work["inference"] == explain.Work(2 * M * (d0 * d1 + d1 * d2), 2 * (weights + layers))
    assert work["forward"] == explain.Work(work["inference"].flops, work["inference"].bytes + 2 * M * d1)
    dgrad = M * d2 + d2 * d1 + 3 * M * d1  # reads dz, W and z; writes dx and the recomputed h
    wgrad = (M * d2 + M * d1 + d2 * d1 + d2) + (M * d1 + M * d0 + d1 * d0 + d1)
    assert work["backward"] == explain.Work(2 * M * (d0 * d1 + 2 * d1 * d2), 2 * (dgrad + wgrad))


def test_a_floor_is_the_larger_of_two_times() -> None:
    assert explain.Work(100, 10).floor(flops_per_second=10, bytes_per_second=10) == 10
    assert explain.Work(10, 100).floor(flops_per_second=10, bytes_per_second=10) == 10
    assert explain.Work(1, 2) + explain.Work(3, 4) == explain.Work(4, 6)


def test_float32_precision_follows_every_switch_of_torch() -> None:
    matmul = torch.backends.cuda.matmul
    for switch, expected in (
        (lambda: setattr(matmul, "fp32_precision", "tf32"), "tf32"),
        (lambda: setattr(matmul, "fp32_precision", "ieee"), "ieee"),
        (lambda: setattr(matmul, "allow_tf32", True), "tf32"),
        (lambda: torch.set_float32_matmul_precision("highest"), "ieee"),
        (lambda: torch.set_float32_matmul_precision("high"), "tf32"),
    ):
        switch()
        assert settings.float32_precision() == expected


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new Python process, without the interpreter unless `environment` sets it."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET",)}
    return subprocess.run(
        [sys.executable, "-c", code], env={**inherited, **environment}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.alone
def test_the_triton_backend_on_the_cpu_says_why_it_cannot_run() -> None:
    code = "import torch; from mlp_fused import FusedMLP; FusedMLP(4, [3], backend='triton')(torch.randn(2, 4))"
    process = run(code)
    assert process.returncode == 1
    sentence = process.stderr.strip().splitlines()[-1]
    assert sentence.startswith('RuntimeError: backend is "triton", but the input is on the CPU')
    assert "set TRITON_INTERPRET=1" in sentence


@pytest.mark.alone
def test_the_environment_chooses_the_backend_and_debugging() -> None:
    code = "import torch\nfrom mlp_fused import FusedMLP\nfrom mlp_fused.kernels.launch import count_launches\n"
    code += "with count_launches() as c: y = FusedMLP(4, [3])(torch.randn(2, 4))\nprint(c)\n"
    process = run(code, TRITON_INTERPRET="1", MLP_FUSED_BACKEND="triton")
    assert process.stdout.strip() == "{'network_forward_kernel': 1}", process.stderr
    wrong = run("import mlp_fused", MLP_FUSED_BACKEND="fast")
    assert "MLP_FUSED_BACKEND is 'fast'; it needs to be one of: auto, triton, reference" in wrong.stderr
    debugged = run(
        "import torch; from mlp_fused import FusedMLP; m = FusedMLP(4, [5, 3], backend='triton')\n"
        "m[3].weight.data[0, 0] = float('nan'); m(torch.randn(2, 4))",
        TRITON_INTERPRET="1",
        MLP_FUSED_DEBUG="1",
    )
    assert (
        "FloatingPointError: layer 1 (identity), forward: 2 of 6 elements of h are NaN or infinite" in debugged.stderr
    )


if __name__ == "__main__":
    print(rule_for_the_grid(), end="")
