"""Saving and loading in all ways that torch supports, to and from torch's modules, and changed weights."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from mlp_fused import ACTIVATIONS, FusedLinear, FusedMLP
from mlp_fused.kernels.launch import count_launches

WIDTHS = (20, [16, 12, 5])
BACKENDS = pytest.mark.parametrize("backend", ["auto", "triton"])


def network(device: str, backend: str = "triton", **arguments: Any) -> FusedMLP:
    arguments = {"activation_layer": "gelu", "dropout": 0.1, **arguments}
    return FusedMLP(*WIDTHS, backend=backend, **arguments).to(device).eval()


def rows(device: str, number: int = 9) -> Tensor:
    return torch.randn(number, WIDTHS[0], device=device)


def call_twice(model: nn.Module, x: Tensor) -> Tensor:
    """The output, after calls in training and in evaluation that may cache paths."""
    model(x).sum().backward()
    model.zero_grad()
    with torch.no_grad():
        return model(x)


def through_a_file(thing: Any, folder: Path, weights_only: bool, device: str | None = None) -> Any:
    torch.save(thing, folder / "saved.pt")
    return torch.load(folder / "saved.pt", weights_only=weights_only, map_location=device)


def through_safetensors(state: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    safetensors.torch.save_file(state, folder / "saved.safetensors")
    return safetensors.torch.load_file(folder / "saved.safetensors")


# Ways to pass a model's state_dict to a later process.
FILES: dict[str, Callable[[dict[str, Tensor], Path], dict[str, Tensor]]] = {
    "torch.save": lambda state, folder: through_a_file(state, folder, weights_only=True),
    "safetensors": through_safetensors,
    "pickle": lambda state, folder: pickle.loads(pickle.dumps(state)),
}


@BACKENDS
@pytest.mark.parametrize("how", FILES)
def test_a_state_dict_round_trips(how: str, backend: str, device: str, tmp_path: Path) -> None:
    model, other, x = network(device, backend), network(device, backend), rows(device)
    y = call_twice(model, x)
    assert not torch.equal(call_twice(other, x), y)
    assert other.load_state_dict(FILES[how](model.state_dict(), tmp_path)) == ([], [])
    assert torch.equal(other(x), y)


@BACKENDS
def test_safetensors_save_and_load_the_model(backend: str, device: str, tmp_path: Path) -> None:
    model, other, x = network(device, backend), network(device, backend), rows(device)
    y = call_twice(model, x)
    call_twice(other, x)
    safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
    assert safetensors.torch.load_model(other, str(tmp_path / "model.safetensors")) == (set(), [])
    assert torch.equal(other(x), y)


COPIES: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model, folder: through_a_file(model, folder, weights_only=False),
}


@BACKENDS
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("kind", ["network", "layer"])
def test_a_copy_is_complete_and_independent(kind: str, how: str, backend: str, device: str, tmp_path: Path) -> None:
    x = rows(device)
    model: Any = network(device, backend, recompute=True)
    if kind == "layer":
        model = FusedLinear(20, 5, activation=ACTIVATIONS["leaky_relu"].bind(negative_slope=0.3), backend=backend)
        model.to(device)
    y = call_twice(model, x)
    twin: Any = COPIES[how](model, tmp_path)
    assert type(twin) is type(model)
    assert twin.backend == backend
    assert twin.training is model.training
    assert getattr(twin, "recompute", None) is getattr(model, "recompute", None)
    assert repr(twin) == repr(model)
    assert torch.equal(twin(x), y)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert not torch.equal(twin(x), y)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_can_be_pickled(name: str, device: str) -> None:
    model, x = network(device, "auto", activation_layer=name, output_activation=name), rows(device)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_weights_only_refuses_a_whole_model(device: str, tmp_path: Path) -> None:
    """torch reads only tensors and plain values, and runs no code of the file, as for any nn.Module."""
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        through_a_file(network(device), tmp_path, weights_only=True)


def torchvision_mlp() -> nn.Sequential:
    """The children of torchvision.ops.MLP(20, [16, 12, 5], activation_layer=nn.GELU, dropout=0.1), in their order."""
    layers: list[nn.Module] = []
    width = WIDTHS[0]
    for hidden in WIDTHS[1][:-1]:
        layers += [nn.Linear(width, hidden), nn.GELU(), nn.Dropout(0.1)]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, WIDTHS[1][-1]), nn.Dropout(0.1))


class TimmMlp(nn.Module):
    """A stand-in for timm.layers.Mlp(20, 16, 5), with its attributes and its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(20, 16)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(0.1)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(16, 5)
        self.drop2 = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


def fused_timm_mlp(backend: str) -> FusedMLP:
    """A fused network with the names of timm's children."""
    return FusedMLP.from_sequential(nn.Sequential(OrderedDict(TimmMlp().named_children())), backend=backend)


# Modules of other libraries, and fused networks with the same keys.
TWINS: dict[str, tuple[Callable[[], nn.Module], Callable[[str], FusedMLP]]] = {
    "nn.Sequential": (
        lambda: nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5)),
        lambda backend: FusedMLP.from_sequential(
            nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5)), backend=backend
        ),
    ),
    "torchvision.ops.MLP": (
        torchvision_mlp,
        lambda backend: FusedMLP(*WIDTHS, activation_layer=nn.GELU, dropout=0.1, backend=backend),
    ),
    "timm.layers.Mlp": (TimmMlp, fused_timm_mlp),
}


@BACKENDS
@pytest.mark.parametrize("how", FILES)
@pytest.mark.parametrize("twin", TWINS)
def test_checkpoints_load_in_both_directions(twin: str, how: str, backend: str, device: str, tmp_path: Path) -> None:
    make, make_fused = TWINS[twin]
    theirs, fused = make().to(device).eval(), make_fused(backend).to(device).eval()
    x = rows(device)
    for source, target in ((theirs, fused), (fused, theirs)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.mul_(1.5)
        call_twice(target, x)
        state = FILES[how](source.state_dict(), tmp_path)
        assert list(state) == list(source.state_dict()) or how == "safetensors"  # safetensors sorts the keys
        assert target.load_state_dict(state) == ([], [])
        with count_launches() as launches:
            y = fused(x)
        assert bool(launches) == (backend == "triton" or device == "cuda")
        torch.testing.assert_close(y, theirs(x), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_of_a_gpu_loads_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mark the storages in the checkpoint as a GPU's, so that this runs on any machine."""
    model, x = network("cpu", "auto"), rows("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(model.state_dict(), tmp_path / "state.pt")
        torch.save(model, tmp_path / "model.pt")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="map_location"):  # torch's own error
        torch.load(tmp_path / "state.pt", weights_only=True)
    other = network("cpu", "auto")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True, map_location="cpu"))
    whole = torch.load(tmp_path / "model.pt", weights_only=False, map_location="cpu")
    assert torch.equal(other(x), model(x))
    assert torch.equal(whole(x), model(x))


@pytest.mark.gpu
@pytest.mark.parametrize("how", [*FILES, "model"])
def test_a_network_saved_on_a_gpu_loads_on_a_cpu(how: str, device: str, tmp_path: Path) -> None:
    model, x = network(device), rows(device)
    y = call_twice(model, x)
    if how == "model":
        loaded = through_a_file(model, tmp_path, weights_only=False, device="cpu")
        loaded.backend = "auto"
    else:
        loaded = network("cpu", "auto")
        loaded.load_state_dict(FILES[how](model.state_dict(), tmp_path))
    torch.testing.assert_close(loaded(x.cpu()), y.cpu(), rtol=1e-4, atol=1e-5)


def step(model: FusedMLP, x: Tensor, kind: type[torch.optim.Optimizer] = torch.optim.SGD, **options: Any) -> None:
    optimizer = kind(model.parameters(), lr=0.1, **options)  # type: ignore[call-arg]
    model(x).square().sum().backward()
    optimizer.step()


def tripled(model: nn.Module) -> dict[str, Tensor]:
    return {name: 3 * value for name, value in model.state_dict().items()}


@torch.no_grad()
def in_place(model: FusedMLP, x: Tensor) -> None:
    model[3].weight.mul_(2)


def new_child(model: FusedMLP, x: Tensor) -> None:
    model[3] = nn.Linear(16, 12, device=x.device)


def new_parameter(model: FusedMLP, x: Tensor) -> None:
    model[3].weight = nn.Parameter(torch.randn_like(model[3].weight))


def new_data(model: FusedMLP, x: Tensor) -> None:
    model[3].weight.data = torch.randn_like(model[3].weight)


def new_strides(model: FusedMLP, x: Tensor) -> None:
    model[3].weight.data = torch.randn(16, 12, device=x.device).t()


def averaged(model: FusedMLP, x: Tensor) -> None:
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda old, new, number: old + 2 * new)
    average.update_parameters(model)
    average.update_parameters(model)
    model.load_state_dict(average.module.state_dict())


# Changes of weights between two calls.
CHANGES: dict[str, Callable[[FusedMLP, Tensor], object]] = {
    "SGD": step,
    "Adam": lambda model, x: step(model, x, torch.optim.Adam),
    "Adam, foreach": lambda model, x: step(model, x, torch.optim.Adam, foreach=True),
    "Adam, fused": lambda model, x: step(model, x, torch.optim.Adam, fused=True),
    "load_state_dict": lambda model, x: model.load_state_dict(tripled(model)),
    "load_state_dict, assign": lambda model, x: model.load_state_dict(tripled(model), assign=True),
    "in place": in_place,
    ".data in place": lambda model, x: model[0].weight.data.mul_(2),
    ".data": new_data,
    ".data of other strides": new_strides,
    "a bias": lambda model, x: model[6].bias.data.add_(1),
    "another parameter": new_parameter,
    "another child": new_child,
    "vector_to_parameters": lambda model, x: nn.utils.vector_to_parameters(
        2 * nn.utils.parameters_to_vector(model.parameters()), model.parameters()
    ),
    "initialised again": lambda model, x: nn.init.xavier_normal_(model[3].weight),
    "an average": averaged,
}


@BACKENDS
@pytest.mark.parametrize("change", CHANGES)
def test_the_next_call_uses_changed_weights(change: str, backend: str, device: str, path: str) -> None:
    """Check forward and backward. No copy of a weight is cached between calls."""
    model, x = network(device, backend), rows(device)
    before = call_twice(model, x)
    CHANGES[change](model, x)
    expected = nn.Sequential(*copy.deepcopy(model))
    results = []
    for current in (model, expected):
        current.zero_grad()
        inputs = x.clone().requires_grad_()
        with count_launches() as launches:
            y = current(inputs)
            y.square().sum().backward()
        assert bool(launches) == (current is model and (backend == "triton" or device == "cuda"))
        results.append([y.detach(), inputs.grad, *(parameter.grad for parameter in current.parameters())])
    assert not torch.allclose(results[0][0], before, rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_cached_paths_are_not_saved(device: str) -> None:
    model = network(device)
    size = len(pickle.dumps(model))
    call_twice(model, rows(device))
    assert len(pickle.dumps(model)) == size
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert b"kernels" not in buffer.getvalue()
