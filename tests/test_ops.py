"""The registered operators give eager results under torch.compile, torch.export, fake tensors and dispatch modes.

Kernels run in the interpreter, or on a GPU under `-m gpu`. (On the CPU without them, compilers see torch's modules.)
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mlp_fused import FusedLinear, FusedMLP, linear_act, mlp
from mlp_fused.engine import ops, paths
from mlp_fused.kernels import devices
from mlp_fused.kernels.activation import parse
from mlp_fused.kernels.activations import ACTIVATIONS
from mlp_fused.kernels.launch import count_launches

BF16 = torch.bfloat16
WIDE, NARROW = (24, 300, 16, 9), (20, 31, 17)  # through layers, and in one kernel


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """The number of graphs that torch.compile has made."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def make_model(widths: tuple[int, ...], device: str, activation: Any = "gelu", **options: Any) -> FusedMLP:
    width, *others = widths
    return FusedMLP(width, others, activation_layer=activation, backend="triton", device=device, **options)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Run forward and backward. Returns y and all gradients."""
    y = model(x)
    leaves = [leaf for leaf in (x, *model.parameters()) if leaf.requires_grad]
    for leaf in leaves:
        leaf.grad = None
    y.float().square().mean().backward()
    return [y, *(leaf.grad for leaf in leaves)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Assert equal dtypes and bits, because the same kernels ran."""
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        assert torch.equal(mine, other)


# With these widths, the saved tensor of 4 rows has no unwritten gaps between layers.
EVEN = (32, 320, 16, 32)
SAMPLES = {
    "layers": (EVEN, "gelu", "sigmoid", torch.float32, torch.float32, None),
    "layers, output saved": (EVEN, "relu", "identity", torch.float32, torch.float32, None),
    "layers of fp32 in bf16": (EVEN, "leaky_relu", "silu", BF16, torch.float32, None),
    "layers, recomputed": (EVEN, "tanh", "tanh", torch.float32, torch.float32, True),
    "one layer": ((16, 320), "identity", "identity", torch.float32, torch.float32, None),
    "network": (NARROW, "gelu", "silu", torch.float32, torch.float32, None),
    "network, stored": (NARROW, "gelu", "silu", torch.float32, torch.float32, False),
    "network of fp32 in bf16": (NARROW, "relu", "identity", BF16, torch.float32, False),
}


@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck(sample: str, rows: int, device: str) -> None:
    widths, hidden, last, dtype, parameter_dtype, recompute = SAMPLES[sample]
    weights = [torch.randn(n, k, device=device, dtype=parameter_dtype) / k**0.5 for k, n in itertools.pairwise(widths)]
    weights[0] = weights[0].t().contiguous().t()  # its gradient is contiguous all the same
    biases = [torch.randn(n, device=device, dtype=parameter_dtype) for n in widths[1:-1]]
    for parameter in (*weights, *biases):
        parameter.requires_grad_()
    names = [hidden] * (len(widths) - 2) + [last]
    biased = [True] * len(biases) + [False]
    settings = (biased, [ACTIVATIONS[name].spec for name in names], dtype, "ieee", recompute, "triton")
    x = torch.randn(rows, widths[0], device=device)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    if rows:
        tests = (*tests, "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.mlp_fused.mlp.default, (x, weights, biases, *settings, True), test_utils=tests)
    with torch.no_grad():
        arguments = (
            x,
            [parameter.detach() for parameter in weights],
            [parameter.detach() for parameter in biases],
            *settings,
            False,
        )
        torch.library.opcheck(torch.ops.mlp_fused.mlp.default, arguments, test_utils=tests)
        y, saved = torch.ops.mlp_fused.mlp(x, weights, biases, *settings, True)
        needs = [False] + [True] * (len(weights) + len(biases))
        for needs[0] in (False, True):
            arguments = (torch.randn_like(y), x, y, saved, weights, biases, *settings, needs)
            torch.library.opcheck(torch.ops.mlp_fused.mlp_backward.default, arguments, test_utils=tests[::2])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_passed_by_name(name: str) -> None:
    activation = ACTIVATIONS[name]
    other = activation.bind(**{name: value + 1 / 3 for name, value in activation.parameters.items()})
    assert parse(activation.spec) is activation
    assert parse(other.spec) is other


def test_an_operator_runs_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """This happens if a network exported for inference on a GPU is loaded on a machine without one."""
    model = FusedMLP(*NARROW[:1], [*NARROW[1:]], activation_layer="gelu")
    x = torch.randn(7, NARROW[0])
    linears = [child for child in model if isinstance(child, nn.Linear)]
    arguments = (
        x,
        [linear.weight for linear in linears],
        [linear.bias for linear in linears],
        [True, True],
        ["gelu", "identity"],
        torch.float32,
        "ieee",
        None,
        "auto",
    )
    with torch.no_grad(), count_launches() as launches:
        y, saved = torch.ops.mlp_fused.mlp(*arguments, False)
    assert torch.equal(y, model(x))
    assert saved == []
    assert launches == {}
    with pytest.raises(RuntimeError, match="cannot save tensors for its backward kernels: the input is on the CPU"):
        torch.ops.mlp_fused.mlp(*arguments, True)


@pytest.mark.parametrize("widths", [WIDE, NARROW], ids=["layers", "network"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compiled_as_one_graph_for_batches_of_any_size(widths: tuple[int, ...], backend: str, device: str) -> None:
    model = make_model(widths, device)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    before = graphs()
    for rows in (9, 12, 13, 30, 5):
        x = torch.randn(rows, widths[0], device=device, requires_grad=True)
        with count_launches() as ours:
            actual = step(compiled, x)
        with count_launches() as eager:
            expected = step(model, x)
        assert_same(actual, expected)
        assert ours == eager
        assert ours
    assert graphs() - before == 2  # for the first batch, then for all


def test_compiled_within_a_model(device: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(24, device=device)
            self.mlp = make_model((24, 96, 24), device, "silu")
            self.head = FusedLinear(24, 5, activation="sigmoid", backend="triton", device=device)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.mlp(self.norm(x)))

    block = Block()
    x = torch.randn(2, 7, 24, device=device, requires_grad=True)  # (batch, tokens, features)
    with count_launches() as launches:
        actual = step(torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True), x)
    assert launches
    for ours, theirs in zip(actual, step(block, x), strict=True):
        torch.testing.assert_close(ours, theirs)


class Residual(nn.Module):
    """x + mlp(x), added in place."""

    def __init__(self, *widths: int, device: str) -> None:
        super().__init__()
        self.mlp = FusedMLP(widths[0], list(widths[1:]), backend="triton", device=device)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.mlp(x)
        h += x
        return h


@pytest.mark.parametrize("widths", [(8, 16, 8), (8, 300, 8)], ids=["one kernel", "layers"])
@pytest.mark.parametrize("way", ["compiled", "under a mode"])
def test_the_output_may_be_changed_in_place(way: str, widths: tuple[int, ...], device: str) -> None:
    model = Residual(*widths, device=device)
    x = torch.randn(5, 8, device=device, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])
    called = torch.compile(model, backend="aot_eager") if way == "compiled" else model
    with Recording() if way == "under a mode" else contextlib.nullcontext():
        y = called(x).square().sum()
    for mine, other in zip(torch.autograd.grad(y, [x, *model.parameters()]), expected):
        torch.testing.assert_close(mine, other)


def test_the_functional_forms_compile(device: str) -> None:
    weights = [(torch.randn(n, k, device=device) / 5).requires_grad_() for k, n in ((24, 40), (40, 6))]
    bias = torch.randn(6, device=device, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        h = mlp(x, weights[:1], None, output_activation=nn.LeakyReLU(0.2), backend="triton")
        return linear_act(h, weights[1], bias, "tanh", backend="triton")

    x = torch.randn(9, 24, device=device)
    leaves = [*weights, bias]
    actual, expected = torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x)
    dy = torch.randn_like(expected)
    assert_same(
        [actual, *torch.autograd.grad(actual, leaves, dy)], [expected, *torch.autograd.grad(expected, leaves, dy)]
    )


@pytest.mark.parametrize("widths", [WIDE, NARROW], ids=["layers", "network"])
def test_compiled_under_autocast(widths: tuple[int, ...], device: str) -> None:
    model = make_model(widths, device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, widths[0], device=device, requires_grad=True)
    with torch.autocast(device, BF16):
        actual, expected = step(compiled, x), step(model, x)
    assert actual[0].dtype == BF16
    assert_same(actual, expected)  # gradients also have the parameters' dtype


def test_changes_after_compiling_take_effect(device: str) -> None:
    model = make_model(NARROW, device, dropout=0.5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, NARROW[0], device=device)
    model.eval()
    assert torch.equal(compiled(x), model(x))
    model.train()
    assert not torch.equal(compiled(x), compiled(x))  # Dropout is active
    model.eval()
    model[0].weight.requires_grad_(False)
    actual = torch.autograd.grad(compiled(x).sum(), model[0].bias)
    assert torch.equal(actual[0], torch.autograd.grad(model(x).sum(), model[0].bias)[0])
    with torch.no_grad():
        model[0].weight.add_(1)
        assert torch.equal(compiled(x), model(x))
    model.backend = "reference"
    with count_launches() as launches:
        compiled(x)
    assert launches == {}
    model.backend = "triton"


def test_a_hooked_child_runs_as_a_module(device: str) -> None:
    """The hook is set before compiling. torch.compile ignores later hooks, in nn.Sequential too."""
    model = make_model(NARROW, device)
    model[0].register_forward_hook(lambda module, inputs, output: output + 1)
    x = torch.randn(9, NARROW[0], device=device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), nn.Sequential.forward(model, x))


def test_torchs_precision_may_change_after_compiling(device: str) -> None:
    used: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        (node,) = (node for node in module.graph.nodes if "mlp_fused.mlp" in str(node.target))
        used.append(node.args[6])
        return module

    model = make_model(NARROW, device)
    x = torch.randn(9, NARROW[0], device=device)
    model(x)  # fills the cache of activations, a change of which would cause a recompilation
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for precision in ("ieee", "tf32", "tf32", "ieee"):
        torch.backends.cuda.matmul.fp32_precision = precision
        assert torch.equal(compiled(x), model(x))
    assert used == ["ieee", "tf32"]


def test_a_table_that_prefers_torch_is_followed(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With backend="auto" on a simulated GPU, the choice is made at trace time, for all batches."""
    for module in (paths, ops):
        monkeypatch.setattr(module, "why_device", lambda device, backend: None)
    asked: list[tuple[int, ...]] = []

    def measured(widths: tuple[int, ...], *arguments: Any) -> str | None:
        asked.append(widths)
        return "torch" if widths[-1] == 17 else None

    monkeypatch.setattr(paths, "_has_measured_networks", lambda *where: True)
    monkeypatch.setattr(paths, "measured_path", measured)
    for widths in (NARROW, (20, 31, 16)):
        weights = [torch.randn(n, k, device=device) / 5 for k, n in itertools.pairwise(widths)]
        compiled = torch.compile(lambda x, weights=weights: mlp(x, weights, None), fullgraph=True, backend="aot_eager")
        with count_launches() as launches:
            compiled(torch.randn(9, 20, device=device))
        assert bool(launches) == (widths[-1] == 16)
    assert asked[:2] == [NARROW, (20, 31, 16)]
    assert NARROW not in asked[1:]


def test_a_devices_properties_are_read_outside_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's properties come from caches and a driver, which a compiler must not trace."""
    monkeypatch.setattr(paths, "INTERPRETER", False)
    asked: list[str] = []

    def describe(kind: str, index: int) -> devices.Device:
        asked.append(kind)
        return devices.DEVICES["NVIDIA H200"]

    monkeypatch.setattr(devices, "describe", describe)
    paths._cached_why_device_cannot.cache_clear()

    def run(x: Tensor) -> Tensor:
        return x + (paths.why_device(torch.device("cuda", 1), "auto") is None)

    assert torch.compile(run, fullgraph=True, backend="eager")(torch.zeros(1)) == 1
    assert asked == ["cuda"]
    paths._cached_why_device_cannot.cache_clear()


def test_compiled_calls_say_why_kernels_cannot_run(device: str) -> None:
    model = make_model(NARROW, device).to(torch.complex64)
    x = torch.randn(9, NARROW[0], device=device, dtype=torch.complex64)
    with pytest.raises(Exception, match="complex64; it needs to be a real floating-point dtype"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(x)


class Recording(TorchDispatchMode):
    """A mode that records every operator and changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_differentiated_gradient_is_refused(device: str) -> None:
    model = make_model(NARROW, device)
    x = torch.randn(9, NARROW[0], device=device, requires_grad=True)
    with Recording():
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match='cannot be differentiated again; .* with backend="reference"'):
            dx.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("widths", [WIDE, NARROW], ids=["layers", "network"])
def test_compiled_into_cuda_graphs(widths: tuple[int, ...], mode: str, device: str) -> None:
    model = make_model(widths, device)
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(4):  # warm-up, recording, replay
        x = torch.randn(64, widths[0], device=device, requires_grad=True)
        torch.compiler.cudagraph_mark_step_begin()
        actual = [tensor.clone() for tensor in step(compiled, x)]
        assert_same(actual, step(model, x))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("widths", [WIDE, NARROW], ids=["layers", "network"])
def test_exported_saved_and_loaded(widths: tuple[int, ...], strict: bool, device: str) -> None:
    model = make_model(widths, device).eval()
    rows = torch.export.Dim("rows", min=1, max=4096)
    x = torch.randn(9, widths[0], device=device)
    with torch.no_grad():
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: rows},), strict=strict)
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.mlp_fused.mlp.default) == 1
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in (x, torch.randn(33, widths[0], device=device)):
        with torch.no_grad():
            assert torch.equal(loaded(batch), model(batch))


@pytest.mark.full
def test_compiled_ahead_of_time(device: str, tmp_path: Any) -> None:
    """A package that C++ calls finds the operator in the dispatcher, where importing mlp_fused puts it."""
    model = make_model(WIDE, device).eval()
    x = torch.randn(9, WIDE[0], device=device)
    with torch.no_grad():
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=64)},))
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        loaded = torch._inductor.aoti_load_package(path)
        for batch in (x, torch.randn(21, WIDE[0], device=device)):
            assert torch.equal(loaded(batch), model(batch))


@pytest.mark.parametrize("recompute", [None, True], ids="recompute={}".format)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("trainable", [(1,), (2,), (1, 2), (0, 2)], ids=str)
@pytest.mark.parametrize("widths", [(20, 160, 144, 8), (20, 16, 12, 8)], ids=["layers", "network"])
def test_gradients_with_frozen_layers(
    widths: tuple[int, ...], trainable: tuple[int, ...], activation: str, recompute: bool | None, device: str
) -> None:
    """An operator has one section for all layers, also for frozen ones below the first trainable one."""
    model = FusedMLP(
        widths[0], list(widths[1:]), activation_layer=activation, backend="triton", recompute=recompute, device=device
    ).requires_grad_(False)
    for index in trainable:
        [child for child in model if isinstance(child, nn.Linear)][index].requires_grad_(True)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    x = torch.randn(9, widths[0], device=device)
    expected = torch.autograd.grad(nn.Sequential(*model.children())(x).square().sum(), wanted)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for actual, true in zip(torch.autograd.grad(compiled(x).square().sum(), wanted), expected, strict=True):
        torch.testing.assert_close(actual, true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", [(), (0,), (1,)], ids=str)
@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("widths", [WIDE, NARROW], ids=["layers", "network"])
def test_flops_are_counted_like_torchs(
    widths: tuple[int, ...], needs_x: bool, frozen: tuple[int, ...], device: str
) -> None:
    """Our formulas count the FLOPs of `mlp`. In a model, torch's counter hooks the children, so they run as modules."""
    model = make_model(widths, device)
    linears = [child for child in model if isinstance(child, nn.Linear)]
    for index in frozen:
        linears[index].requires_grad_(False)
    weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
    x = torch.randn(9, widths[0], device=device, requires_grad=needs_x)
    counted = []
    for run in (lambda x: mlp(x, weights, biases, "gelu", backend="triton"), model, nn.Sequential(*model.children())):
        with FlopCounterMode(display=False) as forward:
            y = run(x)
        with FlopCounterMode(display=False) as backward:
            y.backward(torch.ones_like(y))
        counted.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counted[0] == counted[1] == counted[2]
    assert min(counted[0]) > 0


@pytest.mark.parametrize("widths", [WIDE, NARROW], ids=["layers", "network"])
def test_a_mode_sees_one_operator_each_for_forward_and_backward(widths: tuple[int, ...], device: str) -> None:
    model = make_model(widths, device)
    x = torch.randn(9, widths[0], device=device, requires_grad=True)
    with Recording() as mode, count_launches() as recorded:
        actual = step(model, x)
    assert [name for name in mode.seen if "mlp_fused" in name] == [
        "mlp_fused.mlp.default",
        "mlp_fused.mlp_backward.default",
    ]
    with count_launches() as alone:
        assert_same(actual, step(model, x))
    assert recorded == alone


def test_fake_tensors_are_accepted(device: str) -> None:
    model = make_model(WIDE, device)
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, count_launches() as launches:
        x = mode.from_tensor(torch.randn(9, WIDE[0], device=device))
        y = model(x)
        y.sum().backward()
    assert y.shape == (9, WIDE[-1])
    assert y.device.type == device
    assert launches == {}


def test_a_profiler_shows_layers_by_name(device: str) -> None:
    model = make_model(WIDE, device)
    narrow = make_model(NARROW, device)
    x, thin = torch.randn(9, WIDE[0], device=device), torch.randn(9, NARROW[0], device=device)
    for _ in range(2):  # launches are prepared, then replayed
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            step(model, x)
            step(narrow, thin)
    names = {event.key for event in profiler.key_averages()}
    for layer, activation in enumerate(("gelu", "gelu", "identity")):
        assert f"layer {layer} ({activation}): forward" in names
        assert f"layer {layer} ({activation}): wgrad" in names
    assert "layer 2 (identity): dgrad" in names
    assert "layer 0 (gelu): dgrad" not in names
    assert {"network forward", "network dgrad", "network wgrad", "network: sum_partials"} <= names
