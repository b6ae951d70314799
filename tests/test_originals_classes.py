"""Classes of users and other libraries whose code differs from the computation of a kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from libraries import needs
from replaced_code import (
    BACKENDS,
    assert_agrees,
    doubled,
    network,
    patched,
    runs_kernels,
    twin,
)
from torch import Tensor, nn

from mlp_fused import ACTIVATIONS, FusedLinear, fuse
from mlp_fused.engine import recognize
from mlp_fused.engine.runs import find_runs
from mlp_fused.kernels.launch import count_launches


class OwnCall(nn.Linear):
    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return super().__call__(*arguments, **keywords) * 2


class OwnGetattr(nn.Linear):
    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) + 1 if name == "weight" else super().__getattr__(name)


class OwnGetattribute(nn.Linear):
    def __getattribute__(self, name: str) -> Any:
        parameters = super().__getattribute__("__dict__").get("_parameters", {})
        return parameters[name] + 1 if name == "weight" in parameters else super().__getattribute__(name)


class OwnCallImpl(nn.Linear):
    def _call_impl(self, *arguments: Any, **keywords: Any) -> Any:
        return super()._call_impl(*arguments, **keywords) * 2


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class InheritedForward(OwnForward):
    """A class whose forward differs from torch's by inheritance."""


class Unchanged(nn.Linear):
    """A subclass that changes nothing."""


SUBCLASSES = {
    OwnCall: "OwnCall has a __call__ of its own",
    OwnGetattr: "OwnGetattr has a __getattr__ of its own",
    OwnGetattribute: "OwnGetattribute has a __getattribute__ of its own",
    OwnCallImpl: "OwnCallImpl has a _call_impl of its own",
    OwnForward: "OwnForward has a forward of its own",
    InheritedForward: "OwnForward has a forward of its own",
    Unchanged: "",
}


@BACKENDS
@pytest.mark.parametrize("kind", SUBCLASSES, ids=lambda kind: kind.__name__)
def test_a_subclass_of_linear_with_code_of_its_own_runs_as_a_module(kind: Any, backend: str, device: str) -> None:
    x = torch.randn(5, 8, device=device)
    model = nn.Sequential(kind(8, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU()).to(device)
    model[0].load_state_dict(nn.Linear(8, 8).state_dict())  # some of the classes initialise a changed copy of `weight`
    report = fuse(model, backend=backend)
    assert SUBCLASSES[kind] in str(report)
    expected = twin(model)(x)
    for _ in range(2):
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    with count_launches() as launches:
        model(x)
    if backend == "triton" or device == "cpu":  # on a GPU, auto leaves a Linear with relu to torch
        assert bool(launches) == (backend == "triton")
    if SUBCLASSES[kind]:
        assert SUBCLASSES[kind] in str(model.explain(5))
    inner = FusedLinear(8, 8, activation="gelu", backend=backend, device=device)
    inner.linear = model[0]
    torch.testing.assert_close(inner(x), F.gelu(model[0](x)), rtol=1e-4, atol=1e-5)
    with patched(Unchanged, "__call__", doubled(nn.Module.__call__)):
        torch.testing.assert_close(model(x), twin(model)(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_users_module_around_an_activation_is_called(device: str) -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.activation = ACTIVATIONS["relu"]
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.activation(self.linear(x))

    model = nn.Sequential(nn.Linear(8, 8), Gate(), nn.Linear(8, 8), nn.ReLU()).to(device)
    fuse(model, backend="triton")
    assert_agrees(model, torch.randn(5, 8, device=device), True)


class Mine(nn.Linear):
    """A class that replaces nn.Linear under its name."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Wild(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return input + 1


class Sharp(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input) * 3


@BACKENDS
def test_a_class_with_the_name_of_torchs_is_called(backend: str, device: str) -> None:
    x = torch.randn(5, 8, device=device)
    before = network(device, backend)
    assert_agrees(before, x, runs_kernels(backend, device))
    with patched(nn, "Linear", Mine), patched(nn, "Dropout", Wild), patched(nn, "GELU", Sharp):
        model = network(device, backend, nn.GELU)
        assert [type(child) for child in model[:3]] == [Mine, Sharp, Wild]
        assert_agrees(model, x, False)
        assert_agrees(before, x, runs_kernels(backend, device))
    assert_agrees(model, x, False)


@needs("transformers")
@BACKENDS
def test_replaced_code_of_other_libraries_takes_effect(backend: str, device: str) -> None:
    from transformers.activations import QuickGELUActivation
    from transformers.pytorch_utils import Conv1D

    x = torch.randn(5, 8, device=device)
    model = nn.Sequential(Conv1D(8, 8), QuickGELUActivation(), Conv1D(4, 8), nn.ReLU()).to(device)
    fuse(model, backend=backend)
    before = model(x)
    assert_agrees(model, x, runs_kernels(backend, device))
    for owner, name in ((Conv1D, "forward"), (torch, "addmm"), (QuickGELUActivation, "forward"), (torch, "sigmoid")):
        with patched(owner, name, doubled(getattr(owner, name))):
            for _ in range(2):
                assert_agrees(model, x, None)
            assert not torch.allclose(model(x), before)
        assert torch.equal(model(x), before)


class Squash(nn.Module):
    """A user's activation."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.exp(-input * input)


@BACKENDS
def test_a_replaced_forward_of_a_registered_module_is_called(backend: str, device: str) -> None:
    exp = ACTIVATIONS["exp"]
    activation = dataclasses.replace(exp, name="squash", module=Squash, reference=lambda z: torch.exp(z))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ACTIVATIONS, "squash", activation)
        patch.setattr(recognize, "_BY_MODULE", {})
        x = torch.randn(5, 8, device=device)
        model = nn.Sequential(nn.Linear(8, 8), Squash(), nn.Linear(8, 4)).to(device)
        fuse(model, backend=backend)
        assert [activation.name for _, activation in find_runs(model.children())[0].linears] == ["squash", "identity"]
        model(x)
        with patched(Squash, "forward", doubled(Squash.forward)):
            for _ in range(2):
                assert_agrees(model, x, None)
            assert "Squash.forward was replaced" in str(model.explain(5))
