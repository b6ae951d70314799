"""Schedules: running, replaying, explaining, profiling and checking include every step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mlp_fused import FusedMLP, explain, memory
from mlp_fused.engine import layer_path, schedule, settings
from mlp_fused.engine.autograd import run_layers
from mlp_fused.engine.layer_steps import describe_parameters
from mlp_fused.engine.network_path import NetworkPath
from mlp_fused.engine.paths import find_layers, network_path
from mlp_fused.engine.schedule import Step
from mlp_fused.engine.tables import Choice
from mlp_fused.kernels.activations import ACTIVATIONS, IDENTITY
from mlp_fused.kernels.devices import DEVICES
from mlp_fused.kernels.launch import count_launches, launched_by
from mlp_fused.kernels.layer_forward import pointwise
from mlp_fused.kernels.tile_config import TileConfig
from mlp_fused.reference import Layer

ROWS, WIDTHS = 40, (12, 300, 8)
TILE = TileConfig(16, 16)


@pytest.fixture
def dummy(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Add a step after each layer's product: a copy of its output, which a test may break."""
    options: dict[str, Any] = {"activation": IDENTITY}
    original = layer_path.add_forward

    def add_forward(spec: Any, writer: Any, x: str, weight: str, h: str, *others: Any) -> None:
        copy = writer.allocate(f"copy[{spec.index}]", writer.rows, spec.width_out)

        def run(z: torch.Tensor, h: torch.Tensor) -> Any:
            return pointwise(z, h, options["activation"], TILE)

        original(spec, writer, x, weight, h, *others)
        writer.add("dummy", spec, {"z": h, "h": copy}, ("h",), run, choice=Choice(TILE, ""))

    layer_path.layer_path.cache_clear()
    monkeypatch.setattr(layer_path, "add_forward", add_forward)
    yield options
    layer_path.layer_path.cache_clear()


@pytest.fixture
def model(device: str) -> FusedMLP:
    return FusedMLP(WIDTHS[0], list(WIDTHS[1:]), backend="triton", device=device)


@pytest.fixture
def x(device: str) -> torch.Tensor:
    return torch.randn(ROWS, WIDTHS[0], device=device)


def test_a_step_is_run(model: FusedMLP, x: torch.Tensor, dummy: Any) -> None:
    with count_launches() as launches:
        y = model(x)
    assert launches == {"layer_forward_kernel": 2, "pointwise_kernel": 2}
    torch.testing.assert_close(y, torch.nn.Sequential(*model)(x), rtol=1e-4, atol=1e-4)


def test_a_step_is_replayed(model: FusedMLP, x: torch.Tensor, dummy: Any, by_pointers: None) -> None:
    model(x)  # prepares the launches
    for _ in range(2):
        with count_launches() as launches:
            model(x)
        assert launches == {"layer_forward_kernel": 2, "pointwise_kernel": 2}


def test_steps_that_were_compiled_ahead_are_replayed(model: FusedMLP, x: torch.Tensor, by_pointers: None) -> None:
    with launched_by(lambda launch, tensors: None):
        model(x)
    model(x)  # prepares the launches
    with count_launches() as launches:
        model(x)
    assert launches == {"layer_forward_kernel": 2}


def test_a_step_is_explained(model: FusedMLP, dummy: Any) -> None:
    plan = model.explain(ROWS)
    (run,) = plan.runs
    assert [step.kind for step in run.kernels][:4] == ["forward", "dummy", "forward", "dummy"]
    assert [step.work.bytes for step in run.kernels if step.kind == "dummy"] == [
        2 * 4 * ROWS * width for width in WIDTHS[1:]
    ]
    assert str(plan).count("dummy") == 2


def test_a_steps_buffers_are_counted(model: FusedMLP, dummy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        model.requires_grad_(False)
        with_dummy = memory.need(model, rows=1000).workspace
        layer_path.layer_path.cache_clear()
        monkeypatch.undo()
        without = memory.need(model, rows=1000).workspace
    assert with_dummy - without >= 1000 * sum(WIDTHS[1:]) * 4


def test_a_step_is_a_range_of_the_profiler(model: FusedMLP, x: torch.Tensor, dummy: Any) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        model(x)
    names = {event.key for event in profiler.key_averages()}
    assert {"layer 0 (relu): dummy", "layer 1 (identity): dummy"} <= names


def test_a_step_is_compiled_ahead(model: FusedMLP, x: torch.Tensor, dummy: Any) -> None:
    compiled: list[str] = []
    with launched_by(lambda launch, tensors: compiled.append(launch.kernel.__name__)):
        model.warmup(ROWS, training=False)
    assert compiled == ["layer_forward_kernel", "pointwise_kernel"] * 2


def test_a_step_is_checked(model: FusedMLP, x: torch.Tensor, dummy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "DEBUG", True)
    model(x)
    dummy["activation"] = ACTIVATIONS["exp"]
    with pytest.raises(FloatingPointError, match=r"^layer 0 \(relu\), dummy: \d+ of 12000 elements of h are NaN or"):
        model(1e4 * x)


def test_internal_buffers_share_one_allocation(device: str) -> None:
    """Each buffer in it is aligned like an allocation of torch."""
    given = {"x": torch.randn(5, 3, device=device)}
    writer = schedule.Writer(given, torch.float32, 5)
    for name in ("a", "b", "c"):
        writer.allocate(name, 5, 3, dtype=torch.float64 if name == "b" else None)
    part = writer.part("part of b", "b", 3, 4, 3)
    noted: dict[str, torch.Tensor] = {}

    def run(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, part: torch.Tensor, c: torch.Tensor) -> None:
        noted.update(x=x, a=a, b=b, part=part, c=c)

    operands = {name: name for name in ("x", "a", "b")} | {"part": part, "c": "c"}
    writer.steps.append(Step("note", "a layer", "0", operands, ("a", "b", "part"), run))
    (c,) = writer.finish("c").run([given["x"]], schedule.read_pointers([given["x"]])[0])
    assert c is noted["c"]
    assert noted["a"].untyped_storage().data_ptr() == noted["b"].untyped_storage().data_ptr()
    assert noted["b"].data_ptr() - noted["a"].data_ptr() == schedule.ALIGNMENT
    assert noted["part"].data_ptr() - noted["b"].data_ptr() == 3 * 8
    assert noted["part"].shape == (4, 3)
    assert noted["b"].dtype == torch.float64


def test_a_schedule_for_unaligned_tensors_accepts_any_of_them_unaligned(device: str, by_pointers: None) -> None:
    """Any tensor may be the one that is not 16-byte aligned."""

    def off(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(torch.Size(shape).numel() + 1, device=device)[1:].view(shape)

    model = FusedMLP(64, [304, 64], backend="triton", device=device).requires_grad_(False)
    x, weight = torch.randn(32, 64, device=device), model[0].weight
    for input, parameter in ((off((32, 64)), weight), (x, torch.nn.Parameter(off((304, 64)))), (x, weight)):
        model[0].weight = parameter
        model(input)  # prepares the launches
        torch.testing.assert_close(model(input), torch.nn.Sequential(*model)(input), rtol=1e-4, atol=1e-4)


def test_a_schedule_holds_no_memory_between_runs(model: FusedMLP, x: torch.Tensor) -> None:
    """Memory allocated in a CUDA graph belongs to the graph, so a schedule must not hold any."""
    path = find_layers(x, [Layer(*layer.parameters(), IDENTITY) for layer in (model[0], model[3])], x.dtype, "triton")
    run_layers(x, [model[0].weight, model[3].weight], [model[0].bias, model[3].bias], path).sum().backward()
    schedules = list(path.section(0, 2).cache.values())
    assert len(schedules) == 2  # the forward and the backward
    held = [tensor for cached in schedules for tensor in vars(cached)["_templates"]]
    assert held
    assert sum(tensor.untyped_storage().nbytes() for tensor in held) == 0


def test_a_single_layer_allocates_only_what_it_writes() -> None:
    """The backward of a layer allocates the recomputed output of the layer before, and no gradients of others."""
    layers = explain.meta_layers((256, 512, 512, 256), [ACTIVATIONS["gelu"]] * 3, torch.float32)
    rows = 4096
    path = find_layers(torch.empty(rows, 256, device="meta"), layers, torch.float32, "triton", "ieee")
    wide = torch.empty(rows, 512, device="meta")
    given = {"dy": wide, "x": wide, "weight[1]": layers[1].weight}
    backward = path.section(1, 2).write_backward(given, rows, (True, True, False), DEVICES["NVIDIA A100"])
    partial = sum(buffer.size for name, buffer in backward.buffers.items() if name == "partial")
    assert backward.workspace_bytes == 4 * (rows * 512 + partial)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_forward_returns_what_its_section_says_it_saves(activation: str, dtype: torch.dtype) -> None:
    """On both paths, with Dropout and with weights that are cast: the same tensors, of the same shapes."""
    widths, device = (20, 16, 8), DEVICES["NVIDIA H100"]
    activations = (ACTIVATIONS[activation],) * 2
    layers = explain.meta_layers(widths, activations, torch.float32)
    parameters, dropouts = describe_parameters(layers), (0.1, 0.0)
    by_layers = layer_path.layer_path(widths, activations, parameters, dtype, "ieee", False, dropouts)
    strides = ((20, 1, 1), (16, 1, 1))
    network = network_path(
        widths, strides, activations, dtype, "ieee", device, True, recompute=False, dropouts=dropouts
    )
    assert isinstance(network, NetworkPath)
    meta = {name: torch.empty(20, 20, device="meta") for name in ("h", "x", "seed")}
    for section in (by_layers.section(0, 1), by_layers.section(1, 2), by_layers.section(0, 2), network):
        count = len(section.parameters)
        given = meta | {name: torch.empty(16, 20, device="meta") for name in section.parameters}
        for needs in ((True,) * (1 + count), (False,) * count + (True,)):
            forward = section.write_forward(given, 20, needs, device)
            shapes = section.saved_shapes(20, needs)
            assert forward.returned[2:] == section.saved(needs).names == tuple(shapes)
            for name in shapes.keys() - given.keys():
                assert forward.buffers[name].shape == shapes[name]
