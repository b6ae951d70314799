"""`recompute=True`: modules, layers and networks that compute their hidden layers again in the backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from mlp_fused import FusedMLP, fuse, mlp


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_recomputing_runs_modules_with_state_once(backend: str, device: str) -> None:
    model = FusedMLP(20, [16, 8, 4], nn.BatchNorm1d, recompute=True, backend=backend).to(device)
    model(torch.randn(9, 20, device=device)).sum().backward()
    assert [child.num_batches_tracked.item() for child in model if isinstance(child, nn.BatchNorm1d)] == [1, 1]


def test_recompute_must_be_true_false_or_none() -> None:
    for call in (
        lambda: FusedMLP(4, [3], recompute="yes"),
        lambda: mlp(torch.randn(2, 4), [torch.randn(3, 4)], None, recompute=1),
    ):
        with pytest.raises(TypeError, match="it needs to be True, False or None"):
            call()


def fused(device: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh()).to(device)
    fuse(model, recompute=True)
    return model


RECOMPUTED: dict[str, Callable[[str], nn.Module]] = {
    "modules": lambda device: FusedMLP(20, [16, 4], recompute=True, backend="reference", device=device),
    "modules with Dropout": lambda device: FusedMLP(20, [16, 4], dropout=0.5, recompute=True, device=device),
    "layers": lambda device: FusedMLP(20, [300, 4], recompute=True, backend="triton", device=device),
    "one kernel": lambda device: FusedMLP(20, [16, 4], recompute=True, backend="triton", device=device),
    "fused": fused,
}


@pytest.mark.parametrize("make", RECOMPUTED.values(), ids=RECOMPUTED)
def test_recomputing_uses_the_parameters_of_the_forward(make: Callable[[str], nn.Module], device: str) -> None:
    """functional_call puts the module's own parameters back before the backward."""
    model, x = make(device), torch.randn(9, 20, device=device)
    others = {name: (2 * value).detach().requires_grad_() for name, value in model.named_parameters()}
    results = []
    for model.recompute in (True, False):
        torch.manual_seed(0)
        y = torch.func.functional_call(model, others, (x,))
        results.append(torch.autograd.grad(y.sum(), list(others.values())))
    for mine, other in zip(*results):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("position", [0, -1])
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("make", RECOMPUTED.values(), ids=RECOMPUTED)
def test_recomputing_refuses_changed_parameters(
    make: Callable[[str], nn.Module], name: str, position: int, device: str
) -> None:
    model = make(device)
    y = model(torch.randn(9, 20, device=device))
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)][position]
    with torch.no_grad():
        getattr(linear, name).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


BETWEEN: dict[str, Callable[[FusedMLP, torch.Tensor], object]] = {
    "slope": lambda model, x: setattr(model[1], "negative_slope", 5.0),
    "eval": lambda model, x: model.eval(),
    "probability": lambda model, x: setattr(model[2], "p", 0.0),
    "hook": lambda model, x: model[0].register_forward_hook(lambda module, inputs, y: 2 * y),
    "frozen": lambda model, x: model[3].requires_grad_(False),
    "input": lambda model, x: x.requires_grad_(),
    "weight_norm": lambda model, x: nn.utils.parametrizations.weight_norm(model[0]),
    "no weight": lambda model, x: delattr(model[3], "weight"),
}


@pytest.mark.parametrize("change", BETWEEN)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_recomputation_does_not_see_later_changes(backend: str, change: str, device: str) -> None:
    results = []
    for changed in (False, True):
        torch.manual_seed(1)
        model = FusedMLP(
            20, [300, 4], activation_layer=nn.LeakyReLU, dropout=0.5, recompute=True, backend=backend, device=device
        )
        x = torch.randn(9, 20, device=device)
        parameters = list(model.parameters())
        y = model(x)
        if changed:
            BETWEEN[change](model, x)
        before = [*model.state_dict()]
        y.sum().backward()
        results.append([parameter.grad for parameter in parameters])
        assert [*model.state_dict()] == before
    for expected, actual in zip(*results):
        if change != "frozen" or actual is not None:  # torch adds nothing to the gradient of a frozen parameter
            torch.testing.assert_close(actual, expected)


def test_other_memory_of_a_weight_does_not_change_a_recomputation(device: str) -> None:
    results = []
    for change in (False, True):
        torch.manual_seed(1)
        model = FusedMLP(20, [16, 4], recompute=True, backend="reference", device=device)
        y = model(torch.randn(9, 20, device=device))
        if change:
            model[3].weight.data = 3 * model[3].weight.data
        results.append(torch.autograd.grad(y.sum(), model[0].weight)[0])
    assert torch.equal(*results)


def test_mlp_recomputing_refuses_changed_parameters(device: str) -> None:
    weights = [torch.randn(8, 5, device=device, requires_grad=True), torch.randn(3, 8, device=device)]
    y = mlp(torch.randn(9, 5, device=device), weights, None, recompute=True, backend="reference")
    weights[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_recomputing_under_a_transform(device: str) -> None:
    model = FusedMLP(20, [16, 1], recompute=True).to(device)
    x = torch.randn(20, device=device)
    actual = torch.func.grad(lambda x: model(x).sum())(x)
    torch.testing.assert_close(actual, torch.func.grad(lambda x: nn.Sequential(*model)(x).sum())(x))
