"""Dropout in the kernels: its random numbers, and the same mask in forward and backward.

The table of cases (`tests/cases.py`) checks the results with a mask, against masks computed by numpy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from cases import factors, philox
from kernel_runs import saved_bytes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mlp_fused import ACTIVATIONS, FusedMLP, reference
from mlp_fused.engine import autograd, layer_path, layer_steps, paths, tables
from mlp_fused.engine.autograd import run_layers, run_path
from mlp_fused.engine.paths import find_layers, find_path
from mlp_fused.engine.settings import Backend
from mlp_fused.kernels.activations import IDENTITY
from mlp_fused.kernels.dropout import Dropout, draw_seed
from mlp_fused.kernels.launch import Launch, count_launches, launched_by
from mlp_fused.kernels.layer_backward import dgrad, output_gradient
from mlp_fused.kernels.layer_forward import layer_forward, pointwise
from mlp_fused.kernels.tile_config import TileConfig
from mlp_fused.reference import Layer


@pytest.fixture(params=[pytest.param("layer", marks=pytest.mark.full), "run", "network"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path: one autograd.Function per layer, one for all layers, or one kernel for the whole network."""
    if request.param == "layer":
        monkeypatch.setattr(autograd, "LAUNCH_BOUND", -1)
    if request.param != "network":
        monkeypatch.setattr(paths, "find_network", lambda *arguments: "the other path is tested")
    return request.param


def call_seed(seed: int, device: str) -> int:
    """The seed that a call draws after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    return int(draw_seed(torch.device(device)))


def generator_state(device: str) -> Tensor:
    return torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()


def eyes(width: int, p: float, device: str, count: int = 1) -> FusedMLP:
    """Layers with identity weights, whose only effect is Dropout."""
    model = FusedMLP(width, [width] * count, activation_layer=None, bias=False, dropout=p, backend="triton")
    for linear in model:
        if isinstance(linear, nn.Linear):
            nn.init.eye_(linear.weight)
    return model.to(device)


# From the known answers that come with the paper's code (Random123, tests/kat_vectors).
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
ANSWERS = [
    (7, (0, 0, 0, 0), 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (10, (0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (7, PI, 0x299F31D0A4093822, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, PI, 0x299F31D0A4093822, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "answer"), ANSWERS)
def test_the_philox_of_these_tests_gives_the_papers_numbers(
    rounds: int, counter: tuple[int, ...], key: int, answer: tuple[int, ...]
) -> None:
    actual = philox(key, [numpy.array([word]) for word in counter], rounds)
    assert tuple(int(word[0]) for word in actual) == answer


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0])
def test_a_network_of_eyes_shows_the_mask(p: float, path: str, device: str) -> None:
    """Check forward and backward of the last layer and of the one before it."""
    rows, width = 70, 49
    seed = call_seed(3, device)
    model = eyes(width, p, device, count=2)
    x = torch.ones(rows, width, device=device, requires_grad=True)
    torch.manual_seed(3)
    y = model(x)
    y.backward(torch.ones_like(y))
    below, last = (factors(seed, layer, rows, width, p).to(device) for layer in (0, 1))
    both = (below * last).float()
    torch.testing.assert_close(y, both, rtol=1e-6, atol=0)
    torch.testing.assert_close(x.grad, both, rtol=1e-6, atol=0)
    torch.testing.assert_close(model[0].weight.grad, both.sum(0)[:, None].expand(width, width), rtol=1e-5, atol=0)
    torch.testing.assert_close(model[3].weight.grad, (last.t() @ below).float(), rtol=1e-5, atol=1e-5)


TILES = [
    TileConfig(16, 16, 16, group_m=1),
    TileConfig(32, 64, 16, group_m=2, parts=2),
    TileConfig(64, 32, 16, group_m=1, programs=3, descriptors=True, parts=2),
]


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile_makes_the_same_mask(tile: TileConfig, device: str, poisoned: None) -> None:
    rows, width, dropout = 70, 48, Dropout(0.75, 5)
    seed = torch.tensor([0x0123456789ABCDEF], device=device)
    expected = factors(int(seed), 5, rows, width, 0.25).float().to(device)
    ones, eye = torch.ones(rows, width, device=device), torch.eye(width, device=device)
    outputs = [torch.empty_like(ones) for _ in range(6)]
    layer_forward(ones, eye, None, outputs[0], outputs[1], ACTIVATIONS["gelu"], "ieee", tile, seed, dropout)
    dgrad(ones, eye, outputs[1], outputs[2], outputs[3], ACTIVATIONS["gelu"], "ieee", tile, seed, dropout)
    pointwise(ones, outputs[4], IDENTITY, TileConfig(tile.block_m, tile.block_n, 0), seed, dropout)
    small = TileConfig(tile.block_m, tile.block_n, 0)
    output_gradient(ones, None, outputs[5], IDENTITY, small, seed=seed, dropout=dropout)
    z = torch.ones_like(ones).requires_grad_()
    h = ACTIVATIONS["gelu"](z)
    (slope,) = torch.autograd.grad(h.sum(), z)
    for actual, true in zip(
        outputs, (h.detach() * expected, ones, slope * expected, h.detach() * expected, expected, expected)
    ):
        torch.testing.assert_close(actual, true, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.5, 0.9])
def test_the_rate_the_scale_and_the_mean(p: float, device: str) -> None:
    rows, width = 512, 256
    y = eyes(width, p, device)(torch.ones(rows, width, device=device)).detach()
    kept = y != 0  # the input is all ones, so every 0 was dropped
    sigma = (p * (1 - p) / y.numel()) ** 0.5
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * sigma
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=1e-6, atol=0)
    # No row or column has an unusual mean.
    for axis, count in ((0, rows), (1, width)):
        assert (kept.double().mean(axis) - (1 - p)).abs().max() < 6 * (p * (1 - p) / count) ** 0.5


def masks(count: int, device: str, rows: int = 256, width: int = 128) -> list[Tensor]:
    """The masks of all layers in one call with p = 0.5, as +1 and -1."""
    seed = draw_seed(torch.device(device))
    layer_masks = [torch.ones(rows, width, device=device) for _ in range(count)]
    for layer, mask in enumerate(layer_masks):
        pointwise(mask, mask, IDENTITY, seed=seed, dropout=Dropout(0.5, layer))
    return [mask - 1 for mask in layer_masks]


def test_layers_calls_rows_and_columns_are_independent(device: str) -> None:
    """Check their correlations, which for n pairs are about 1 / sqrt(n)."""
    first, second = masks(3, device), masks(3, device)
    assert set(first[0].unique().tolist()) == {-1.0, 1.0}
    for a, b in itertools.combinations([*first, *second], 2):
        assert (a * b).mean().abs() < 5 / a.numel() ** 0.5
    for mask in first:
        for along, shift in itertools.product((0, 1), (1, 2, 4, 8, 16, 32, 64)):
            pairs = mask * mask.roll(shift, along)
            assert pairs.mean().abs() < 5 / mask.numel() ** 0.5, (along, shift)
        assert mask.unique(dim=0).shape == mask.shape
        assert mask.unique(dim=1).shape == mask.shape
        # Rows are as independent as normal random numbers, so no singular value is unusually large.
        m, n = mask.shape
        assert torch.linalg.matrix_norm(mask, 2) < m**0.5 + n**0.5 + 5


def test_torchs_seed_fixes_the_masks_and_every_call_differs(path: str, device: str) -> None:
    model = FusedMLP(20, [31, 17], activation_layer="gelu", dropout=0.4, backend="triton").to(device)
    x = torch.randn(33, 20, device=device)

    def call() -> list[Tensor]:
        y = model(x)
        return [y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))]

    torch.manual_seed(11)
    first, second = call(), call()
    torch.manual_seed(11)
    assert all(map(torch.equal, first, call()))
    assert not torch.equal(first[0], second[0])
    assert all(map(torch.equal, second, call()))
    with torch.no_grad():  # Dropout is active here too, with the same numbers
        torch.manual_seed(11)
        assert torch.equal(model(x), first[0])


def test_runs_and_networks_draw_independent_masks(device: str) -> None:
    parts = [eyes(32, 0.5, device) for _ in range(2)]
    model = FusedMLP.from_sequential(nn.Sequential(*parts[0], nn.Tanh(), *parts[1]), backend="triton")
    x = torch.ones(40, 32, device=device)
    with count_launches() as launches:
        model(x)
    assert launches == {"network_forward_kernel": 2}
    first, second = (part(x) != 0 for part in parts)
    assert not torch.equal(first, second)


def test_idle_dropout_costs_nothing(device: str) -> None:
    """Dropout with p = 0 or in evaluation adds no launch, draws no random number, and adds no argument."""
    model = FusedMLP(16, [16, 320], dropout=0.5, backend="triton").to(device)
    plain = FusedMLP.from_sequential(nn.Sequential(*(c for c in model if type(c) is not nn.Dropout)), backend="triton")
    x = torch.randn(9, 16, device=device)
    for idle in (lambda: model.eval(), lambda: model.train().apply(never_drop)):
        idle()
        before = generator_state(device)
        with count_launches() as launches:
            y = model(x)
        with count_launches() as plain_launches:
            assert torch.equal(y, plain(x))
        assert launches == plain_launches == {"layer_forward_kernel": 2}
        assert torch.equal(generator_state(device), before)
        y.sum().backward()


def never_drop(module: nn.Module) -> None:
    if isinstance(module, nn.Dropout):
        module.p = 0.0


def test_a_kernel_without_dropout_has_no_code_for_it() -> None:
    """The seed, the keep probability and the layer are None, a constant to the compiler, and no tensor is passed."""
    launched: list[tuple[Launch, int]] = []
    leaves = make_leaves(torch.float32, "cpu")
    layers = [Layer(*leaves[1:3], ACTIVATIONS["gelu"]), Layer(*leaves[3:], ACTIVATIONS["gelu"])]
    with launched_by(lambda launch, tensors: launched.append((launch, len(tensors)))):
        y = run_layers(leaves[0], leaves[1::2], leaves[2::2], find_layers(leaves[0], layers, torch.float32, "triton"))
        y.sum().backward()
    counted = {launch.kernel.__name__: tensors for launch, tensors in launched if "wgrad" not in launch.kernel.__name__}
    assert counted == {"layer_forward_kernel": 5, "output_gradient_kernel": 4, "dgrad_kernel": 5}
    for launch, tensors in launched:
        if launch.kernel.__name__ in counted:
            assert launch.kernel.arg_names[tensors : tensors + 3] == ["seed_ptr", "keep", "layer"]
            assert launch.scalars[:3] == (None, None, None)


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "sigmoid", "hardtanh"])
def test_p_of_one_gives_zeros_and_no_nan(activation: str, path: str, device: str) -> None:
    model = FusedMLP(20, [31, 17], activation_layer=activation, dropout=1.0, backend="triton").to(device)
    x = (1e3 * torch.randn(33, 20, device=device)).requires_grad_()
    y = model(x)
    assert torch.equal(y, torch.zeros_like(y))
    y.backward(torch.randn_like(y))
    for leaf in (x, *model.parameters()):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_dropped_inf_and_nan_give_nan(device: str) -> None:
    """torch drops by a product with 0, which gives NaN too."""
    x = torch.tensor([[torch.nan, torch.inf, 1.0]], device=device)
    y = torch.empty_like(x)
    pointwise(x, y, IDENTITY, seed=draw_seed(y.device), dropout=Dropout(0.0, 0))
    assert torch.equal(y.isnan().cpu(), nn.functional.dropout(x.cpu(), 1.0).isnan())
    assert y[0, 2] == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("activation", ["relu", "sigmoid", "gelu"])
def test_a_checkpoint_recomputes_the_same_mask(use_reentrant: bool, activation: str, path: str, device: str) -> None:
    model = FusedMLP(20, [31, 17], activation_layer=activation, dropout=0.4, backend="triton").to(device)
    x = torch.randn(33, 20, device=device, requires_grad=True)

    def gradients(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(2)
        y = call(x)
        torch.rand(3, device=device)  # other code draws between forward and backward
        return [y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()], retain_graph=False)]

    def with_checkpoint() -> list[Tensor]:
        torch.manual_seed(2)
        for leaf in (x, *model.parameters()):
            leaf.grad = None
        y = checkpoint(model, x, use_reentrant=use_reentrant)
        torch.rand(3, device=device)
        y.square().sum().backward()  # the reentrant kind supports no other way
        return [y, x.grad, *(parameter.grad for parameter in model.parameters())]

    expected = gradients(model)
    assert all(map(torch.equal, expected, with_checkpoint()))
    model.recompute = True
    assert all(map(torch.equal, expected, gradients(model)))


@pytest.mark.parametrize("layer_by_layer", [False, True], ids=["all layers at once", "layer by layer"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_recomputing_draws_no_random_numbers(
    activation: str, layer_by_layer: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask is the same even if the generator cannot be reset, as with torch 2.9 in the capture of a CUDA graph."""
    if layer_by_layer:
        monkeypatch.setattr(autograd, "LAUNCH_BOUND", -1)
    for module in (torch, torch.cuda):
        monkeypatch.setattr(module, "set_rng_state", lambda *arguments, **keywords: None)
    model = FusedMLP(20, [31, 17], activation_layer=activation, dropout=0.4, backend="triton").to(device)
    x = torch.randn(33, 20, device=device, requires_grad=True)
    results = []
    for recompute in (False, True):
        model.recompute = recompute
        torch.manual_seed(2)
        y = model(x)
        before = generator_state(device)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
        assert torch.equal(generator_state(device), before)
    assert all(map(torch.equal, *results))


def test_a_second_backward_has_the_same_mask(path: str, device: str) -> None:
    model = FusedMLP(20, [31, 17], activation_layer="gelu", dropout=0.4, backend="triton").to(device)
    y = model(torch.randn(33, 20, device=device))
    leaves = list(model.parameters())
    first = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    model(torch.randn(33, 20, device=device)).sum().backward()  # another call, another seed
    assert all(map(torch.equal, first, torch.autograd.grad(y.sum(), leaves)))


NAMES = ("identity", "relu", "gelu", "tanh", "hardtanh", "sigmoid")


def make_leaves(dtype: torch.dtype, device: str, rows: int = 3) -> list[Tensor]:
    """The leaves x, W_0, b_0, W_1 and b_1."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((rows, 4), (5, 4), (5,), (3, 5), (3,))
    return [torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def run(leaves: list[Tensor], name: str, backend: Backend = "triton") -> Tensor:
    x, w0, b0, w1, b1 = leaves
    layers = [Layer(w0, b0, ACTIVATIONS[name], 0.4), Layer(w1, b1, ACTIVATIONS[name], 0.4)]
    torch.manual_seed(4)
    return run_path(x, (w0, w1), (b0, b1), find_path(x, layers, x.dtype, None, backend))


@pytest.mark.parametrize("name", ["relu", "gelu", "tanh"])
def test_gradcheck(name: str, path: str) -> None:
    leaves = make_leaves(torch.float64, "cpu")
    assert torch.autograd.gradcheck(lambda *tensors: run(list(tensors), name), leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *tensors: run(list(tensors), name), leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["identity", "relu", "gelu", "tanh"])
def test_a_gradient_that_is_differentiated_or_batched_has_the_same_mask(name: str, path: str, device: str) -> None:
    leaves = make_leaves(torch.float32, device, rows=33)
    dy = torch.randn(2, 33, 3, device=device)
    y = run(leaves, name)
    plain = torch.autograd.grad(y, leaves, dy[1], retain_graph=True)
    differentiable = torch.autograd.grad(y, leaves, dy[1], retain_graph=True, create_graph=True)
    batched = torch.autograd.grad(y, leaves, dy, is_grads_batched=True, retain_graph=True)
    for ours, other, several in zip(plain, differentiable, batched):
        torch.testing.assert_close(other, ours, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(several[1], ours, rtol=1e-4, atol=1e-5)
    # The second derivative is compared with torch's for the same mask.
    seed = call_seed(4, device)
    twins = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    h = twins[0]
    for layer in (0, 1):
        h = reference.linear_act(h, *twins[1 + 2 * layer : 3 + 2 * layer], ACTIVATIONS[name])
        h = h * factors(seed, layer, *h.shape, 0.4).float().to(device)
    expected = torch.autograd.grad(h, twins, dy[1], create_graph=True)
    penalties = [sum(gradient.square().sum() for gradient in grads) for grads in (differentiable, expected)]
    actual, true = (
        torch.autograd.grad(penalty, inputs, allow_unused=True, materialize_grads=True)
        for penalty, inputs in zip(penalties, (leaves, twins))
    )
    for ours, torchs in zip(actual, true):
        torch.testing.assert_close(ours, torchs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("activation", NAMES)
def test_dropout_saves_only_the_seed(activation: str, path: str, device: str) -> None:
    """No mask is saved, only one tensor per layer as without Dropout. torch saves one more byte per element."""
    sizes = {}
    for p in (0.0, 0.5):
        # A width of 320 takes the layer path with and without Dropout. 64 rows need no padding.
        widths = [16, 16 if path == "network" else 320]
        model = FusedMLP(16, widths, activation_layer=activation, dropout=p, backend="triton").to(device)
        x = torch.randn(64, 16, device=device)
        sizes[p] = saved_bytes(lambda model=model, x=x: model(x), model.parameters())
        assert model.explain(64).saved_bytes == sizes[p]
    assert sizes[0.5] == sizes[0.0] + 8


@pytest.mark.parametrize("activation", ["relu", "gelu", "sigmoid"])
def test_dropout_adds_only_the_launch_of_the_seed(activation: str, path: str, device: str) -> None:
    counted = {}
    for p in (0.0, 0.5):
        options: dict[str, Any] = {"activation_layer": activation, "output_activation": activation, "dropout": p}
        model = FusedMLP(16, [16, 16 if path == "network" else 320], **options, backend="triton").to(device)
        plan = model.explain(9)
        with count_launches() as launches:
            model(torch.randn(9, 16, device=device)).sum().backward()
        counted[p] = dict(launches)
        counted[p].pop("sum_partials_kernel", None)
        kinds = [kernel.kind for run in plan.runs for kernel in run.kernels if kernel.kind != "sum_partials"]
        assert kinds.count("seed") == (p > 0)
        assert sum(counted[p].values()) == len(kinds) - (p > 0)
        assert plan.path == ("network" if path == "network" else "layer")
    assert counted[0.5] == counted[0.0]


def test_a_changed_probability_is_used_and_torch_refuses_a_wrong_one(device: str) -> None:
    model = eyes(64, 0.5, device)
    x = torch.ones(100, 64, device=device)
    for p in (0.5, 0.9, 0.1, 1, 0):
        model[-1].p = p
        assert abs((model(x) != 0).double().mean().item() - (1 - p)) < 0.05
    model[-1].p = 1.5
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        model(x)


@pytest.mark.parametrize("name", ["identity", "relu", "gelu", "tanh"])
def test_torchs_products_drop_like_the_kernels(
    name: str, path: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "choice_for", lambda problem, device: tables.Choice(None, "a test"))
    leaves = make_leaves(torch.float32, device, rows=33)
    results = []
    for backend in ("triton", "auto", "auto"):  # with auto, torch's products run in both calls
        with count_launches() as launches:
            y = run(leaves, name, backend)
            gradients = torch.autograd.grad(y.square().sum(), leaves)
        kernel = "network_forward_kernel" if path == "network" else "layer_forward_kernel"
        assert (kernel in launches) == (backend == "triton")
        results.append([y, *gradients])
    layer_path.layer_path.cache_clear()
    for ours, *torchs in zip(*results):
        for other in torchs:
            torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast(dtype: torch.dtype, device: str) -> None:
    model = eyes(48, 0.5, device, count=2)
    x = torch.ones(33, 48, device=device)
    seed = call_seed(6, device)
    torch.manual_seed(6)
    with torch.autocast(device, dtype):
        y = model(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    expected = factors(seed, 0, 33, 48, 0.5) * factors(seed, 1, 33, 48, 0.5)
    assert torch.equal(y.double().cpu(), expected)
    assert model[0].weight.grad.dtype == torch.float32


def test_warmup_compiles_for_dropout_and_draws_nothing(device: str) -> None:
    model = FusedMLP(300, [300, 24], dropout=0.5, backend="triton").to(device).eval()
    before = generator_state(device)
    seen: list[object] = []
    write = layer_path.add_forward

    def note(spec: layer_steps.LayerSpec, *arguments: Any) -> None:
        seen.append(spec.dropout)
        write(spec, *arguments)

    layer_path.layer_path.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_path, "add_forward", note)
        model.warmup(8)
    layer_path.layer_path.cache_clear()
    assert torch.equal(generator_state(device), before)
    assert None in seen
    assert Dropout(0.5, 0) in seen


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 512], ids=["network", "layer"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_a_replayed_cuda_graph_draws_new_masks(activation: str, width: int, device: str) -> None:
    model = FusedMLP(width, [width] * 2, activation_layer=activation, dropout=0.5, backend="triton").to(device)
    x = torch.randn(1024, width, device=device)
    leaves = list(model.parameters())

    def step() -> list[Tensor]:
        y = model(x)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append([tensor.clone() for tensor in captured])
    for one, other in itertools.combinations(seen, 2):
        assert not torch.equal(one[0] != 0, other[0] != 0)
    for y, *gradients in seen:
        assert abs((y != 0).double().mean().item() - 0.5) < 0.02
        assert all(tensor.isfinite().all() for tensor in (y, *gradients))


@pytest.mark.gpu
@pytest.mark.alone
def test_rows_beyond_32_bits_of_elements_have_independent_masks(device: str) -> None:
    rows, width = 2**21 + 64, 1024
    x = torch.ones(rows, 16, device=device, dtype=torch.bfloat16)
    weight = torch.full((width, 16), 1 / 16, device=device, dtype=torch.bfloat16)
    seed = call_seed(9, device)
    torch.manual_seed(9)
    y = run_layers(x, [weight], [None], find_layers(x, [Layer(weight, None, IDENTITY, 0.5)], torch.bfloat16, "triton"))
    assert y.numel() > 2**31
    expected = factors(seed, 0, 64, 16, 0.5, first=rows - 64)
    assert torch.equal(y[-64:, :16].double().cpu(), expected)
