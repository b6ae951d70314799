"""A change of behaviour on a class, in a module of torch or by a mode takes effect in layers that kernels could run.

Every result is compared with that of the plain twin, torch's modules called one after another, under the same change.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from replaced_code import (
    BACKENDS,
    assert_agrees,
    doubled,
    layer,
    network,
    patched,
    runs_kernels,
    twin,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mlp_fused import ACTIVATIONS, FusedLinear, FusedMLP, Pointwise, fuse, linear_act, mlp, unfuse
from mlp_fused.engine import originals, paths
from mlp_fused.engine.recognize import CALLED, FUNCTIONS
from mlp_fused.engine.runs import Segments as _Segments


def fused(device: str, backend: str, activation: Any = "gelu") -> nn.Sequential:
    """An nn.Sequential that was fused in place."""
    model = nn.Sequential(*network(device, "auto", activation))
    fuse(model, backend=backend)
    return model


def layers(device: str, backend: str, activation: Any = "gelu") -> nn.Sequential:
    """FusedLinear within an nn.Sequential that was fused in place."""
    model = nn.Sequential(
        FusedLinear(8, 16, activation=activation, device=device), nn.Linear(16, 8, device=device), nn.ReLU()
    )
    fuse(model, backend=backend)
    return model


MODELS: dict[str, Callable[..., Any]] = {
    "FusedMLP": network,
    "Sequential, fused": fused,
    "FusedLinear, fused": layers,
    "FusedLinear": layer,
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def doubled_linear(function: Callable[..., Any]) -> Callable[..., Any]:
    """A method for every module that doubles the result of a Linear."""

    def method(self: nn.Module, *arguments: Any, **keywords: Any) -> Any:
        result = function(self, *arguments, **keywords)
        return result * 2 if isinstance(self, nn.Linear) and isinstance(result, Tensor) else result

    return method


def shifted_weight(self: nn.Module, name: str) -> Any:
    value = nn.Module.__getattr__(self, name)
    return value + 1 if name == "weight" and isinstance(self, nn.Linear) else value


def shifted_attribute(self: Any, name: str) -> Any:
    return (
        object.__getattribute__(self, "_parameters")["weight"] + 1
        if name == "weight"
        else object.__getattribute__(self, name)
    )


getattr_of_module = nn.Module.__getattr__


def shifted_module_attribute(self: nn.Module, name: str) -> Any:
    value = getattr_of_module(self, name)
    return value + 1 if name == "weight" and isinstance(self, nn.Linear) else value


# For each change: the owner and the name of the replaced attribute, and its replacement.
PATCHES: dict[str, tuple[Any, str, Any]] = {
    "Linear.forward": (nn.Linear, "forward", doubled(nn.Linear.forward)),
    "Linear.__call__": (nn.Linear, "__call__", doubled(nn.Module.__call__)),
    "Linear._call_impl": (nn.Linear, "_call_impl", doubled(nn.Module._call_impl)),
    "Linear.__getattr__": (nn.Linear, "__getattr__", shifted_weight),
    "Linear.__getattribute__": (nn.Linear, "__getattribute__", shifted_attribute),
    "Linear.weight": (nn.Linear, "weight", property(lambda self: self._parameters["weight"] + 1)),
    "Module.__call__": (nn.Module, "__call__", doubled_linear(nn.Module.__call__)),
    "Module._call_impl": (nn.Module, "_call_impl", doubled_linear(nn.Module._call_impl)),
    "Module.__getattr__": (nn.Module, "__getattr__", shifted_module_attribute),
    "F.linear": (F, "linear", doubled(F.linear)),
    "F.gelu": (F, "gelu", doubled(F.gelu)),
}


@BACKENDS
@every_model
@pytest.mark.parametrize("patch", PATCHES)
def test_a_change_between_two_calls_takes_effect_until_it_is_undone(
    patch: str, make: Callable[..., Any], backend: str, device: str
) -> None:
    model, x = make(device, backend), torch.randn(5, 8, device=device)
    assert_agrees(model, x, runs_kernels(backend, device))
    before = model(x)
    with patched(*PATCHES[patch]):
        for _ in range(2):
            assert_agrees(model, x, None if patch == "F.gelu" else False)  # the Linear is still torch's own
        assert not torch.allclose(model(x), before)
    for _ in range(2):
        assert torch.equal(model(x), before)


ACTIVATION_MODULES = {activation.name: activation for activation in ACTIVATIONS.values() if activation.module}


@pytest.mark.parametrize("name", ACTIVATION_MODULES)
def test_an_activation_whose_forward_is_replaced_runs_as_a_module(name: str, device: str) -> None:
    kind = ACTIVATION_MODULES[name].module
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh() if kind is not nn.Tanh else nn.ReLU(), nn.Linear(8, 8)).to(device)
    model.append(kind(*ACTIVATION_MODULES[name].values) if name != "gelu_tanh" else nn.GELU("tanh"))
    fuse(model, backend="triton")
    x = torch.randn(5, 8, device=device)
    assert_agrees(model, x, True)
    with patched(kind, "forward", doubled(kind.forward)):
        reason = originals.why_changed(kind, kind)
        for _ in range(2):
            assert_agrees(model, x, True)  # kernels run the layer before it
        assert reason is not None
        assert reason in str(model.explain(5))
    assert_agrees(model, x, True)
    assert reason not in str(model.explain(5))


def called_functions(name: str) -> list[str]:
    """The functions called for an activation, by torch's module for it or by the reference."""
    kind = ACTIVATIONS[name].module
    module = (
        Pointwise(name) if kind is None else nn.GELU("tanh") if name == "gelu_tanh" else kind(*ACTIVATIONS[name].values)
    )
    called: list[str] = []
    names = {**FUNCTIONS, **{function: "" for functions in CALLED.values() for function in functions}}

    with contextlib.ExitStack() as stack:
        for full in names:
            owner, own_name = (F if full.startswith(F.__name__) else torch), full.rpartition(".")[2]

            def record(function: Any, full: str, *arguments: Any, **keywords: Any) -> Any:
                called.append(full)
                return function(*arguments, **keywords)

            recorded = functools.partial(record, getattr(owner, own_name), full)
            stack.enter_context(patched(owner, own_name, recorded))
        module(torch.randn(3))
        ACTIVATIONS[name](torch.randn(3))
    return called


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_function_that_an_activation_calls_is_known(name: str) -> None:
    assert set(called_functions(name)) <= set(originals.functions_called(name))


@BACKENDS
@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if originals.functions_called(name)])
def test_a_replaced_function_of_an_activation_takes_effect(name: str, backend: str, device: str) -> None:
    x = torch.randn(5, 8, device=device)
    for make in (network, layer):
        model = make(device, backend, ACTIVATIONS[name])
        assert_agrees(model, x, runs_kernels(backend, device))
        changed = 0
        for full in dict.fromkeys(called_functions(name)):
            owner, own_name = (F if full.startswith(F.__name__) else torch), full.rpartition(".")[2]
            before = model(x)
            with patched(owner, own_name, doubled(getattr(owner, own_name))):
                expected = twin(model)(x)
                for _ in range(2):
                    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
                changed += not torch.allclose(expected, before)
            assert torch.equal(model(x), before)
        assert changed


class Doubling(TorchFunctionMode):
    """A mode that doubles every linear product."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        return result * 2 if function is F.linear else result


class Counting(TorchFunctionMode):
    """A mode that counts linear products."""

    seen = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += function is F.linear
        return function(*args, **(kwargs or {}))


@BACKENDS
@every_model
def test_a_function_mode_takes_effect_while_it_is_active(make: Callable[..., Any], backend: str, device: str) -> None:
    model, x = make(device, backend), torch.randn(5, 8, device=device)
    assert_agrees(model, x, runs_kernels(backend, device))
    before = model(x)
    with Doubling():
        for _ in range(2):
            assert_agrees(model, x, False)
        assert not torch.allclose(model(x), before)
        assert "Doubling, a TorchFunctionMode, is active" in str(model.explain(5))
        with Counting() as watching:
            model(x)
        assert watching.seen == sum(isinstance(module, nn.Linear) for module in model.modules())
    assert_agrees(model, x, runs_kernels(backend, device))
    assert torch.equal(model(x), before)


def test_the_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    model = network("cpu", "triton")
    paths.log_once.cache_clear()
    with caplog.at_level("INFO", "mlp_fused"), Doubling():
        for _ in range(2):
            _Segments(model).log_reasons()
    assert [record.getMessage() for record in caplog.records] == [
        "plain torch runs instead of the kernels: Doubling, a TorchFunctionMode, is active"
    ]


@every_model
def test_torchs_device_mode_changes_nothing(make: Callable[..., Any], device: str) -> None:
    model, x = make(device, "triton"), torch.randn(5, 8, device=device)
    with torch.device(device):
        for _ in range(2):
            assert_agrees(model, x, True)
        with Doubling():
            assert_agrees(model, x, False)


@pytest.mark.parametrize(
    "call", [lambda x, w: linear_act(x, w, None, "gelu"), lambda x, w: mlp(x, [w], None, "gelu", "gelu")]
)
def test_the_functional_forms_see_changes(call: Callable[..., Tensor]) -> None:
    x, w = torch.randn(5, 8), torch.randn(4, 8)
    for change in (Doubling(), patched(F, "linear", doubled(F.linear)), patched(F, "gelu", doubled(F.gelu))):
        with change:
            assert torch.equal(call(x, w), F.gelu(F.linear(x, w)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda: Doubling(), "Doubling, a TorchFunctionMode, is active"),
        (lambda: patched(F, "linear", doubled(F.linear)), "torch.nn.functional.linear was replaced by double"),
        (lambda: patched(F, "gelu", doubled(F.gelu)), "torch.nn.functional.gelu was replaced by double"),
    ],
    ids=["mode", "linear", "gelu"],
)
def test_the_functional_forms_say_why_kernels_cannot_run(change: Any, reason: str, device: str) -> None:
    x, w = torch.randn(5, 8, device=device), torch.randn(4, 8, device=device)
    linear_act(x, w, None, "gelu", backend="triton")
    with change(), pytest.raises(RuntimeError, match=f'backend is "triton", but {reason}'):
        linear_act(x, w, None, "gelu", backend="triton")
    linear_act(x, w, None, "gelu", backend="triton")


@BACKENDS
@pytest.mark.parametrize("training", [False, True])
def test_a_replaced_dropout_is_called(training: bool, backend: str, device: str) -> None:
    x = torch.randn(5, 8, device=device)
    model = network(device, backend).train(training)
    assert_agrees(model, x, runs_kernels(backend, device))
    for owner, name in ((nn.Dropout, "forward"), (F, "dropout")):
        with patched(owner, name, doubled(getattr(owner, name))):
            expected = twin(model)(x)
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(x), expected)
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(type(module)))
    try:
        model(x)
    finally:
        handle.remove()
    assert called.count(nn.Dropout) == 2


@BACKENDS
def test_a_replaced_forward_of_a_sequential_is_called(backend: str, device: str) -> None:
    x = torch.randn(5, 8, device=device)
    plain = nn.Sequential(nn.Linear(8, 8), nn.GELU()).to(device)
    models = [copy.deepcopy(plain), FusedMLP.from_sequential(copy.deepcopy(plain), backend=backend)]
    fuse(models[0], backend=backend)
    expected = [plain(x)]
    with patched(nn.Sequential, "forward", doubled(nn.Sequential.forward)):
        expected.append(plain(x))
        late = copy.deepcopy(plain)
        assert "Sequential.forward was replaced by double" in str(fuse(late))
        for model in models:
            assert torch.equal(model(x), expected[1])
            assert "Sequential.forward was replaced by double" in str(model.explain(5))
    for model in models:
        torch.testing.assert_close(model(x), expected[0], rtol=1e-5, atol=1e-5)


def test_a_replaced_method_of_a_pattern_is_called(device: str) -> None:
    x = torch.randn(2, 5, 8, device=device)
    kind = nn.TransformerEncoderLayer
    model = kind(8, 2, 16, batch_first=True, dropout=0.0, device=device)
    expected = model(x)
    fuse(model, backend="triton")
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    with patched(kind, "_ff_block", doubled(kind._ff_block)):
        other = kind(8, 2, 16, batch_first=True, dropout=0.0, device=device)
        other.load_state_dict(model.state_dict())
        assert torch.equal(model(x), other(x))
        assert "TransformerEncoderLayer._ff_block was replaced by double" in str(fuse(other))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    unfuse(model)
    assert torch.equal(model(x), expected)


SCRIPT = """
import torch
import torch.nn.functional as F
from torch import nn

original = {changed}

def double(*arguments, **keywords):
    return original(*arguments, **keywords) * 2

{changed} = double
from mlp_fused import FusedLinear, FusedMLP
from mlp_fused.kernels.launch import count_launches

x = torch.randn(5, 8)
for backend in ("auto", "triton"):
    {changed} = double
    plain = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4), nn.GELU())
    model = FusedMLP.from_sequential(plain, backend=backend)
    layer = FusedLinear(8, 8, activation="gelu", backend=backend)
    expected = plain(x)
    assert "was replaced by double" in str(model.explain(5))
    for _ in range(2):
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer(x), F.gelu(layer.linear(x)), rtol=1e-5, atol=1e-5)
    {changed} = original
    undone = plain(x)
    assert not torch.allclose(expected, undone)
    with count_launches() as launches:
        torch.testing.assert_close(model(x), undone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer(x), F.gelu(layer.linear(x)), rtol=1e-4, atol=1e-5)
    assert bool(launches) == (backend == "triton"), launches
"""


@pytest.mark.parametrize("changed", ["nn.Linear.forward", "nn.GELU.forward", "F.linear", "F.gelu"])
def test_a_change_before_the_import_takes_effect_until_it_is_undone(changed: str) -> None:
    """In a new process, a function replaced before the import must not count as torch's own."""
    root = Path(__file__).parent.parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", SCRIPT.format(changed=changed)]
    done = subprocess.run(command, cwd=root, env=environment, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("make", [network, layer], ids=["FusedMLP", "FusedLinear"])
def test_compiled_layers_see_changes(make: Callable[..., Any], device: str) -> None:
    model, x = make(device, "triton"), torch.randn(5, 8, device=device)
    results = []
    for change in (contextlib.nullcontext(), patched(*PATCHES["Linear.forward"]), Doubling()):
        torch._dynamo.reset()
        with change:
            ours, theirs = (
                torch.compile(network, backend="eager", fullgraph=True)(x) for network in (model, twin(model))
            )
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        results.append(ours)
    assert not any(torch.allclose(results[0], changed) for changed in results[1:])
