"""Libraries that inspect a model: graph drawers, attributions, and per-sample gradients."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from libraries import load
from torch import Tensor, nn
from twins import BACKENDS, KINDS, fused_and_twin

from mlp_fused import FusedLinear, FusedMLP, linear_act
from mlp_fused.kernels.launch import count_launches

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1])


def saved_sizes(y: Tensor) -> list[torch.Size]:
    """The sizes of all tensors saved for the backward of y, read like graph drawers do."""
    sizes, nodes, seen = [], [y.grad_fn], set()
    while nodes:
        node: Any = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        sizes += [tensor.size() for tensor in getattr(node, "saved_tensors", ())]
        nodes += [following for following, _ in node.next_functions]
    return sizes


MODELS: dict[str, Any] = {
    "network": lambda: FusedMLP(4, [8, 3], backend="triton"),
    "network, keeps z": lambda: FusedMLP(4, [8, 3], output_activation="gelu", recompute=False, backend="triton"),
    "network, stored": lambda: FusedMLP(4, [8, 8, 3], recompute=False, backend="triton"),
    "network, no bias": lambda: FusedMLP(4, [8, 3], bias=False, backend="triton"),
    "layers": lambda: FusedMLP(4, [300, 3], activation_layer="gelu", backend="triton"),
    "layers, dropout": lambda: FusedMLP(4, [300, 3], dropout=0.5, backend="triton"),
    "one layer": lambda: FusedLinear(4, 300, activation="relu", backend="triton"),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["", "first layer frozen"])
@pytest.mark.parametrize("name", MODELS)
def test_no_saved_tensor_is_none(name: str, frozen: bool) -> None:
    model = MODELS[name]()
    if frozen:
        next(model.parameters()).requires_grad_(False)
    with count_launches() as launches:
        assert saved_sizes(model(X))
    assert launches


@pytest.mark.parametrize("functional", [False, True], ids=["module", "function"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_torchviz_draws_the_graph_with_saved_tensors(kind: str, backend: Any, functional: bool) -> None:
    make_dot = load("torchviz").make_dot
    model, _ = fused_and_twin(kind, backend)
    names = dict(model.named_parameters())
    y = model(X)
    if functional:
        names = {"weight": torch.randn(3, 4, requires_grad=True)}
        y = linear_act(X, names["weight"], None, "relu", backend=backend)
    drawn = make_dot(y.sum(), names, show_attrs=True, show_saved=True).source
    assert all(name in drawn for name in names)


def first_linear(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if isinstance(module, nn.Linear))


ATTRIBUTIONS: dict[str, Any] = {
    "saliency": lambda captum, model: captum.Saliency(model).attribute(X, target=LABELS),
    "integrated gradients": lambda captum, model: captum.IntegratedGradients(model).attribute(X, target=LABELS),
    "integrated gradients of a layer": lambda captum, model: captum.LayerIntegratedGradients(
        model, first_linear(model)
    ).attribute(X, target=LABELS),
    "a layer's output": lambda captum, model: captum.LayerActivation(model, first_linear(model)).attribute(X),
    "shapley values": lambda captum, model: captum.ShapleyValueSampling(model).attribute(X, target=LABELS),
    "deep lift": lambda captum, model: captum.DeepLift(model).attribute(X, target=LABELS),
    "guided backprop": lambda captum, model: captum.GuidedBackprop(model).attribute(X, target=LABELS),
}
HOOKS_ACTIVATIONS = ("deep lift", "guided backprop")  # they replace the gradient of modules such as nn.ReLU


@pytest.mark.parametrize("method", ATTRIBUTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_captum_gives_the_attributions_of_plain_modules(kind: str, backend: Any, method: str) -> None:
    if kind == "linear" and method in HOOKS_ACTIVATIONS:
        pytest.skip("a FusedLinear's activation is no module")
    captum = load("captum.attr")
    attributed = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum warns that it sets requires_grad and hooks
        for model in fused_and_twin(kind, backend):
            torch.manual_seed(0)
            attributed.append(ATTRIBUTIONS[method](captum, model))
    assert torch.allclose(*attributed, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opacus_per_sample_gradients(kind: str, backend: Any) -> None:
    opacus = load("opacus")
    samples = []
    for model in fused_and_twin(kind, backend):
        module = opacus.GradSampleModule(model)
        nn.functional.cross_entropy(module(X), LABELS).backward()
        samples.append([parameter.grad_sample for parameter in module.parameters()])
    assert len(samples[0]) == 4
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*samples, strict=True))


@pytest.mark.filterwarnings("ignore")  # opacus warns that its random numbers are not secure
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opacus_trains_as_with_plain_modules(kind: str, backend: Any) -> None:
    opacus = load("opacus")
    trained = []
    for model in fused_and_twin(kind, backend):
        assert opacus.validators.ModuleValidator.validate(model) == []
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, LABELS), batch_size=5)
        module, optimizer, loader = opacus.PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            data_loader=loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            noise_generator=torch.Generator().manual_seed(0),
        )
        before = copy.deepcopy(list(module.parameters()))
        for x, labels in loader:
            nn.functional.cross_entropy(module(x), labels).backward()
            optimizer.step()
        assert not any(map(torch.equal, before, module.parameters()))
        trained.append(list(module.parameters()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*trained, strict=True))
