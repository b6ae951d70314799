"""Tests that have to pass where Triton cannot be imported, as on Windows and macOS.

test_without_triton.py runs these tests, in a process in which the import of Triton fails. No other run collects them.
"""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import TINY, call
from test_saved_files import MODELS, assert_gives, load
from torch import Tensor, nn

import mlp_fused
from mlp_fused import FusedLinear, FusedMLP, fuse, linear_act, mlp, register_activation, unfuse
from mlp_fused.kernels.devices import DEVICES
from mlp_fused.kernels.language import WHY_NO_TRITON
from mlp_fused.train.predict import load_model

SENTENCE = f'backend is "triton", but {WHY_NO_TRITON}; backend="auto" runs plain torch'


def output_and_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of its sum with respect to x and the parameters."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.sum().backward()
    gradients = [leaf.grad for leaf in (x, *model.parameters()) if leaf.grad is not None]
    return [y, *gradients]


def assert_same(one: nn.Module, other: nn.Module, x: Tensor) -> None:
    for ours, torchs in zip(output_and_gradients(one, x), output_and_gradients(other, x)):
        assert torch.equal(ours, torchs)


def test_triton_is_blocked() -> None:
    assert getattr(sys.modules.get("triton"), "jit", None) is None
    assert WHY_NO_TRITON is not None


@pytest.mark.parametrize("recompute", [None, True])
def test_a_network_equals_its_twin(recompute: bool | None) -> None:
    model = FusedMLP(6, [8, 8, 3], activation_layer="gelu", recompute=recompute)
    twin = nn.Sequential(*copy.deepcopy(list(model)))
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert_same(model, twin, torch.randn(5, 6))
    for other in copies:
        twin.zero_grad()
        assert_same(other, twin, torch.randn(5, 6))
    assert model.warmup(16) >= 0


def test_a_layer_equals_its_twin() -> None:
    layer = FusedLinear(6, 4, activation="silu")
    assert_same(layer, nn.Sequential(copy.deepcopy(layer.linear), nn.SiLU()), torch.randn(5, 6))


def test_functions() -> None:
    x, weight, bias = torch.randn(5, 6), torch.randn(4, 6), torch.randn(4)
    expected = torch.relu(nn.functional.linear(x, weight, bias))
    assert torch.equal(linear_act(x, weight, bias, "relu"), expected)
    assert torch.equal(mlp(x, [weight], [bias], output_activation="relu"), expected)


def test_fuse_and_unfuse() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)))
    twin, x = copy.deepcopy(model), torch.randn(5, 2, 3)
    assert [entry.name for entry in fuse(model).replaced] == ["1"]
    assert_same(model, twin, x)
    unfuse(model)
    assert type(model[1]) is nn.Sequential
    assert torch.equal(model(x), twin(x))


def test_explain_of_this_machine() -> None:
    plan = FusedMLP(6, [8, 3]).explain(16)
    assert (plan.path, plan.reason) == ("reference", "the input is on the CPU")
    plan = FusedMLP(6, [8, 3], backend="triton").explain(16)
    assert (plan.path, plan.reason) == ("reference", WHY_NO_TRITON)


@pytest.mark.parametrize("gpu", DEVICES)
def test_explain_of_a_gpu_elsewhere(gpu: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "mlp_fused"):
        narrow = FusedMLP(64, [64, 64, 64]).explain(4096, torch.bfloat16, gpu)
        wide = FusedMLP(784, [512, 512, 10]).explain(4096, torch.bfloat16, gpu)
    assert (narrow.path, wide.path) == ("network", "layer")
    assert gpu in str(wide)
    assert not caplog.records  # no warning that the tables were measured with another version of Triton


@pytest.mark.parametrize(
    "run",
    [
        lambda x: FusedMLP(6, [8, 3], backend="triton")(x),
        lambda x: FusedLinear(6, 3, backend="triton")(x),
        lambda x: linear_act(x, torch.randn(4, 6), backend="triton"),
        lambda x: fuse_for_triton()(x),
        lambda x: FusedMLP(6, [8, 3], backend="triton").warmup(16),
    ],
    ids=["FusedMLP", "FusedLinear", "linear_act", "fuse", "warmup"],
)
def test_kernels_are_refused_in_one_sentence(run) -> None:
    with pytest.raises(RuntimeError) as refusal:
        run(torch.randn(2, 6))
    assert str(refusal.value) == SENTENCE


def fuse_for_triton() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    fuse(model, backend="triton")
    return model


def test_an_activation_equals_its_reference() -> None:
    """The two functions in Triton cannot be compiled here, so None replaces them."""
    register_activation("gaussian", None, None, reference=lambda z: torch.exp(-z * z))
    model = FusedMLP(6, [8, 3], activation_layer="gaussian")
    x = torch.randn(5, 6)
    z = model[0](x)
    assert torch.equal(model(x), model[3](torch.exp(-z * z)))
    assert_same(pickle.loads(pickle.dumps(model)), model, x)


@MODELS
def test_a_saved_model_gives_its_stored_output(path: Path) -> None:
    assert_gives(load(path), path)


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("env") == 0
    lines = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["triton"].strip() == f"none ({WHY_NO_TRITON})"
    assert lines["mlp_fused"].strip() == mlp_fused.__version__


def test_train_then_predict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", x=np.random.default_rng(0).normal(size=(50, 3)), y=np.arange(50) % 2)
    train = ["train", "--data", "data.npz", *TINY, "--checkpoint", "run.pt"]
    assert call(*train) == 0
    assert call(*train, "--epochs", "3", "--resume") == 0
    assert call("predict", "--checkpoint", "run.pt", "--data", "data.npz", "--out", "out.csv") == 0
    assert len(Path("out.csv").read_text().splitlines()) == 51
    assert load_model("run.pt")(torch.zeros(2, 3, dtype=torch.float64)).shape == (2, 2)
    assert call("train", "--data", "data.npz", *TINY, "--backend", "triton") != 0
    assert capsys.readouterr().err == f"mlp-fused: the backend is triton, but {WHY_NO_TRITON}\n"


def test_tune_without_triton_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("tune") != 0
    assert capsys.readouterr().err.startswith("mlp-fused: ")
