"""Dropout in the network kernels: the masks of the layer kernels, in every form of the backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mlp_fused import ACTIVATIONS, FusedMLP
from mlp_fused.engine.autograd import run_layers, run_network
from mlp_fused.engine.network_path import NetworkPath
from mlp_fused.engine.paths import UNMEASURED_DROPOUT, find_layers, find_network, network_path
from mlp_fused.kernels.activation import Activation
from mlp_fused.kernels.devices import DEVICES
from mlp_fused.kernels.dropout import redraws
from mlp_fused.kernels.launch import Launch, count_launches, launched_by
from mlp_fused.kernels.network_tiles import is_dropout_measured
from mlp_fused.kernels.tile_config import TileConfig
from mlp_fused.reference import Layer

BF16 = torch.bfloat16
LAYERS = 3
WIDTH = 49  # not a multiple of 16, so that columns are padded
ROWS = 70  # several tiles, the last of which is not full

ONE_PASS = TileConfig(32, programs=2)
FORMS: dict[str, dict[str, Any]] = {
    "recompute": {"formulation": "recompute", "backward_tile": ONE_PASS, "groups": ()},
    "stored": {"formulation": "stored", "backward_tile": ONE_PASS, "groups": ((0, LAYERS),)},
    "stored by layers": {"formulation": "stored", "backward_tile": ONE_PASS, "groups": ((2, 3), (1, 2), (0, 1))},
    "two kernels": {"formulation": "stored", "groups": ()},
    "forward again": {"formulation": "rerun", "groups": ()},
}
KERNELS = {"two kernels": "network_dgrad_kernel", "forward again": "network_dgrad_kernel"}


def make_layers(activation: Activation, dtype: torch.dtype, device: str, p: float = 0.3) -> list[Layer]:
    """Layers with identity weights and no bias."""
    eyes = [torch.eye(WIDTH, dtype=dtype, device=device).requires_grad_() for _ in range(LAYERS)]
    return [Layer(eye, None, activation, p) for eye in eyes]


def make_path(form: str, x: Tensor, layers: list[Layer]) -> NetworkPath:
    """The network path of the layers, with its backward in the given form."""
    path = find_network(x, layers, x.dtype, recompute=False)
    assert isinstance(path, NetworkPath)
    assert path.formulation == "stored"
    return replace(path, reason="a test", **FORMS[form])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_masks_equal_those_of_the_layer_kernels(
    dtype: torch.dtype, activation: str, form: str, device: str, poisoned: None
) -> None:
    """The forward and the input's gradient are bit-identical if both paths use the same kind of product."""
    if form.startswith("stored") and dtype == torch.float32:
        pytest.skip("one pass over stored tensors is for 16 bits")
    layers = make_layers(ACTIVATIONS[activation], dtype, device)
    weights = tuple(layer.weight for layer in layers)
    x = torch.ones(ROWS, WIDTH, dtype=dtype, device=device, requires_grad=True)
    path, by_layers = make_path(form, x, layers), find_layers(x, layers, dtype, "triton")
    results = []
    for run in (
        lambda: run_network(x, weights, (None,) * LAYERS, path),
        lambda: run_layers(x, weights, (None,) * LAYERS, by_layers),
    ):
        torch.manual_seed(5)
        with count_launches() as launches:
            y = run()
            results.append((y, *torch.autograd.grad(y.sum(), (x, *weights))))
        assert ("layer_forward_kernel" in launches) or KERNELS.get(form, "network_one_pass_kernel") in launches
    (y, dx, *gradients), (layer_y, layer_dx, *layer_gradients) = results
    assert (y == 0).any()
    if path.network.precision == "fp16x3":  # the layer path uses other products
        assert torch.equal(y == 0, layer_y == 0)
        for ours, other in zip(results[0], results[1]):
            torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
        return
    assert torch.equal(y, layer_y)
    # gelu and its slope are computed together in one pass over stored tensors. Everything else has the same roundings.
    if activation == "gelu" and form.startswith("stored"):
        torch.testing.assert_close(dx, layer_dx, rtol=2 * torch.finfo(dtype).eps, atol=0)
    else:
        assert torch.equal(dx, layer_dx)
    for ours, other in zip(gradients, layer_gradients):
        torch.testing.assert_close(ours, other, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("recompute", [None, True, False], ids="recompute={}".format)
@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_the_users_choice_of_recompute_changes_no_mask(activation: str, recompute: bool | None, device: str) -> None:
    model = FusedMLP(20, [31, 24, 17], activation_layer=activation, dropout=0.4, backend="triton", device=device)
    x = torch.randn(33, 20, device=device, requires_grad=True)
    results = []
    for choice in (recompute, None):
        model.recompute = choice
        torch.manual_seed(2)
        y = model(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    for ours, other in zip(*results):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", [None, True, False], ids="recompute={}".format)
@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_dropout_saves_only_the_seed(activation: str, recompute: bool | None, device: str) -> None:
    """For tanh, z is saved instead of its output, which takes no more memory."""
    sizes = {}
    for p in (0.0, 0.5):
        options: dict[str, Any] = {"activation_layer": activation, "dropout": p, "recompute": recompute}
        model = FusedMLP(16, [16, 64], **options, output_activation="relu", backend="triton", device=device)
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(torch.randn(64, 16, device=device))
        plan = model.explain(64)
        assert plan.path == "network"
        assert plan.saved_bytes == sum(saved.values())
        sizes[p] = plan.saved_bytes
        del y
    assert sizes[0.5] == sizes[0.0] + 8


def launches(model: FusedMLP, x: Tensor) -> list[tuple[Launch, int]]:
    """The launches of a training step, with their numbers of tensors. None is executed."""
    launched: list[tuple[Launch, int]] = []
    with launched_by(lambda launch, tensors: launched.append((launch, len(tensors)))):
        model(x).sum().backward()
    return [entry for entry in launched if entry[0].kernel.__name__.startswith("network")]


@pytest.mark.parametrize("recompute", [True, False], ids="recompute={}".format)
def test_without_dropout_the_kernels_have_no_code_for_it(recompute: bool) -> None:
    """The seed and the probabilities are None, a constant to the compiler, and no tensor is passed in their place."""
    model = FusedMLP(20, [32, 32, 8], activation_layer="gelu", recompute=recompute, backend="triton")
    for launch, tensors in launches(model, torch.randn(9, 20)):
        assert launch.kernel.arg_names[tensors : tensors + 2] == ["seed_ptr", "keeps"]
        assert launch.scalars[:2] == (None, None)
        assert not any(launch.constants["NET"].drops)


@pytest.mark.parametrize("recompute", [True, False], ids="recompute={}".format)
def test_another_probability_compiles_nothing(recompute: bool) -> None:
    launched = []
    for p in (0.1, 0.25):
        model = FusedMLP(20, [32, 32, 8], activation_layer="gelu", dropout=p, recompute=recompute, backend="triton")
        model[-1].p = 0.0
        launched.append(launches(model, torch.randn(9, 20)))
    assert len(launched[0]) == len(launched[1])
    for (one, _), (other, _) in zip(*launched):
        assert one.constants == other.constants  # NET is the same object
        assert one.scalars[0] == (0.9, 0.9, None)
        assert other.scalars[0] == (0.75, 0.75, None)
        assert one.scalars[1:] == other.scalars[1:]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_masks_are_not_redrawn_where_a_zero_output_has_a_zero_gradient(name: str) -> None:
    activation = ACTIVATIONS[name]
    assert not redraws(activation, False)
    assert redraws(activation, True) == (name not in ("relu", "softshrink"))
    if not redraws(activation, True):
        one, zero = torch.ones(()), torch.zeros(())
        assert activation.reference_backward is not None
        assert activation.reference_backward(one, zero, *activation.values) == 0


def test_a_bound_activation_is_judged_by_its_parameters() -> None:
    """A slope of 0 makes leaky_relu relu."""
    assert not redraws(ACTIVATIONS["leaky_relu"].bind(negative_slope=0.0), True)
    assert redraws(ACTIVATIONS["leaky_relu"].bind(negative_slope=-0.5), True)


@pytest.mark.parametrize("name", ["NVIDIA A100", "NVIDIA H100", "NVIDIA B200", "AMD MI300X"])
def test_auto_takes_the_network_kernel_only_where_it_was_measured(name: str) -> None:
    device = DEVICES[name]
    problem = ((64, 64, 64), ((64, 1, 1),) * 2, (ACTIVATIONS["relu"],) * 2, BF16, "ieee", device)
    for training in (True, False):
        path = network_path(*problem, training, dropouts=(0.1, 0.0), torch_too=True)
        measured = is_dropout_measured((64,), BF16, device)
        assert isinstance(path, NetworkPath) if measured else path == UNMEASURED_DROPOUT
        assert isinstance(network_path(*problem, training, dropouts=(0.1, 0.0)), NetworkPath)
        assert isinstance(network_path(*problem, training, dropouts=(0.0, 0.0), torch_too=True), NetworkPath)


def test_evaluation_equals_the_network_without_dropout(device: str) -> None:
    model = FusedMLP(20, [31, 17], dropout=0.4, backend="triton", device=device)
    plain = FusedMLP(20, [31, 17], backend="triton", device=device)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(33, 20, device=device)
    assert not torch.equal(model(x), plain(x))
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert torch.equal(model(x), plain(x))
