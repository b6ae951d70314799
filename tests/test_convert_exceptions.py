"""Modules that `fuse` leaves unfused and names, arguments that it refuses, and patterns that users add."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models_to_fuse import Deep, sequences
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from mlp_fused import PATTERNS, FusedLinear, FusedMLP, fuse, register_pattern, unfuse
from mlp_fused.engine.recognize import import_path
from mlp_fused.kernels.launch import count_launches


def test_a_child_with_hooks_is_called_and_named(device: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh()).to(device)
    seen: list[int] = []
    model[0].register_forward_pre_hook(lambda *arguments: seen.append(1))
    report = fuse(model, backend="triton")
    assert "2 + tanh; 0 is called as a module: it has hooks" in str(report)
    with count_launches() as launches:
        model(torch.randn(3, 8, device=device))
    assert launches == {"network_forward_kernel": 1}
    assert seen == [1]


def test_hooks_on_the_replaced_module_stay(device: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).to(device)
    model.register_forward_hook(lambda module, inputs, output: output + 1)
    x = torch.randn(3, 8, device=device)
    expected = model(x)
    assert len(fuse(model, backend="triton").replaced) == 1
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


class FirstTwo(nn.Sequential):
    """A Sequential that calls two of its children: nn.Sequential's forward iterates over the module."""

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([*super().__iter__()][:2])


def test_a_sequence_with_its_own_order_is_not_replaced(device: str) -> None:
    model = FirstTwo(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).to(device)
    x = torch.randn(5, 8, device=device)
    expected = model(x)
    assert "FirstTwo has a __iter__ of its own" in str(fuse(model))
    assert torch.equal(model(x), expected)


class Named(nn.Sequential):
    def __init__(self, width: int, name: str) -> None:
        super().__init__(nn.Linear(width, width), nn.ReLU())
        self.name = name


def test_the_class_of_a_replaced_module_makes_others(device: str) -> None:
    plain, named = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), Named(8, "a")
    for model in (plain, named):
        assert fuse(model).replaced
    assert [*type(plain)(*plain)] == [*plain]
    assert type(named)(4, name="b").name == "b"
    assert type(named)(4, "b")(torch.ones(2, 4)).shape == (2, 4)


def parametrized() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(8, 8))


class Adapted(nn.Linear):
    """A LoRA layer: a Linear with a forward of its own."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.up(self.down(input))


class Wrapped(nn.Module):
    """A LoRA layer that wraps a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(8, 8)

    def forward(self, input: Tensor) -> Tensor:
        return self.base_layer(input)


def patched() -> nn.Module:
    linear = nn.Linear(8, 8)
    linear.forward = lambda input: F.linear(input, linear.weight)  # type: ignore[method-assign]
    return linear


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (parametrized, "0 is called as a module: its weight is parametrized"),
        (Adapted, "0 is called as a module: Adapted has a forward of its own"),
        (Wrapped, "0.base_layer (Linear): called in Wrapped's own forward"),
        (patched, "0 is called as a module: it has hooks, or a forward patched onto it"),
    ],
    ids=["parametrized", "LoRA", "LoRA around", "patched"],
)
def test_a_linear_with_changed_behaviour_is_called_and_named(
    make: Callable[[], nn.Module], reason: str, device: str
) -> None:
    for rest in ([], [nn.Linear(8, 8), nn.GELU()]):
        model = nn.Sequential(make(), nn.ReLU(), *rest).to(device)
        x = torch.randn(3, 8, device=device)
        expected = model(x)
        report = fuse(model, backend="triton")
        assert len(report.replaced) == bool(rest)
        assert reason in str(report)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


class Quantised(Tensor):
    """A tensor subclass, which quantisers assign to a Linear's weight."""


def test_quantised_weights_are_not_fused_and_are_named() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model[0].weight = nn.Parameter(model[0].weight.detach().as_subclass(Quantised))
    report = fuse(model)
    assert report.replaced == ()
    assert "its 0.weight is Quantised, not a plain tensor" in str(report)


def test_shared_weights_are_not_fused_and_are_named() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            one = nn.Linear(8, 8)
            self.twice = nn.Sequential(one, nn.ReLU(), one, nn.ReLU())
            self.a = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
            self.b = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
            self.b[0].weight = self.a[0].weight
            self.free = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    report = fuse(Shared())
    assert [entry.name for entry in report.replaced] == ["free"]
    assert {entry.name: entry.text for entry in report.left} == {
        "twice": "its 0.weight is shared with twice.2.weight",
        "a": "its 0.weight is shared with b.0.weight",
        "b": "its 0.weight is shared with a.0.weight",
    }


class Own(nn.Module):
    """A common kind of module, which calls the activation as a function in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)))


def test_an_activation_called_in_forward_is_reported_as_unknown() -> None:
    report = fuse(nn.Sequential(Own(), nn.ModuleList([nn.Linear(2, 2)])))
    assert report.replaced == ()
    text = str(report)
    assert "0.fc1, 0.fc2 (Linear): called in Own's own forward, where an activation cannot be seen" in text
    assert "replace the Linear by FusedLinear(…, activation=…)" in text
    fixed = Own()
    fixed.fc1 = FusedLinear(8, 8, activation="relu")
    assert [entry.text for entry in fuse(fixed).left if entry.name == "fc1"] == ["it is fused already"]
    assert "the model itself (Linear)" in str(fuse(nn.Linear(2, 2)))


def test_subclasses_are_fused_if_they_keep_forward() -> None:
    class Kept(nn.Sequential):
        pass

    class Changed(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    class Layer(nn.TransformerEncoderLayer):
        def _ff_block(self, x: Tensor) -> Tensor:
            return x

    class Backed(nn.Sequential):
        backend = "mine"

    parts = (nn.Linear(8, 8), nn.ReLU())
    model = nn.ModuleList(
        [kind(*copy.deepcopy(parts)) for kind in (Kept, Changed, Backed)]
        + [Layer(8, 2, 8), nn.Sequential(nn.Linear(8, 8))]
    )
    model.append(copy.deepcopy(model[0]))
    model[5].forward = lambda input: input
    report = fuse(model)
    assert [entry.name for entry in report.replaced] == ["0"]
    assert isinstance(model[0], Kept)
    assert isinstance(model[0], FusedMLP)
    reasons = {entry.name: entry.text for entry in report.left}
    assert reasons["1"].startswith("Changed has a forward of its own")
    assert reasons["2"] == "it has an attribute 'backend' of its own"
    assert reasons["3"].startswith("Layer has a _ff_block of its own")
    assert reasons["4"].startswith("no Linear in it is followed by an activation")
    assert reasons["5"] == "a forward is patched onto it"


def test_unfuse_leaves_the_users_fused_mlp() -> None:
    model = nn.Sequential(FusedMLP(4, [4, 2]))
    assert "0 (FusedMLP): it is fused already" in str(fuse(model))
    assert unfuse(model) == ()
    assert type(model[0]) is FusedMLP


def test_unfuse_names_modules_that_it_cannot_undo() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    fuse(model)
    model[1].__class__ = type("FSDPSequential", (type(model[1]),), {})
    with pytest.raises(RuntimeError, match="1 was changed to FSDPSequential after fuse.*call unfuse before that"):
        unfuse(model)
    assert isinstance(model[0], FusedMLP)


def test_filter_fn_has_the_signature_of_torchaos() -> None:
    model = Deep()
    asked: list[tuple[str, str]] = []

    def choose(module: nn.Module, name: str) -> bool:
        asked.append((type(module).__name__, name))
        return name != "tail"

    report = fuse(model, choose)
    assert asked == [("Sequential", "body.0"), ("Sequential", "tail"), ("Sequential", "tail.3")]
    assert [entry.name for entry in report.replaced] == ["body.0", "tail.3"]
    assert [entry.name for entry in report.left if entry.text == "filter_fn returned False"] == ["tail"]
    assert type(model.tail) is nn.Sequential


def fail(module: nn.Module, name: str) -> bool:
    raise KeyError(name)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"model": [nn.Linear(1, 1)]}, TypeError, "model is list; it needs to be an nn.Module"),
        ({"filter_fn": "tail"}, TypeError, "filter_fn is 'tail'; it needs to be a function"),
        ({"filter_fn": lambda module, name: name}, TypeError, "filter_fn returned 'body.0' for 'body.0'"),
        (
            {"filter_fn": lambda module, name: None if name == "tail.3" else True},
            TypeError,
            "returned None for 'tail.3'",
        ),
        ({"filter_fn": fail}, KeyError, "body.0"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'; it needs to be one of"),
        ({"recompute": 1}, TypeError, "recompute is 1; it needs to be True, False or None"),
    ],
    ids=["model", "filter", "answer", "late answer", "raises", "backend", "recompute"],
)
def test_a_mistake_gives_one_sentence_and_changes_nothing(arguments: Any, error: Any, sentence: str) -> None:
    model = Deep()
    with pytest.raises(error, match=re.escape(sentence)):
        fuse(**{"model": model, **arguments})
    assert unfuse(model) == ()
    with pytest.raises(TypeError, match="model is int"):
        unfuse(3)  # type: ignore[arg-type]


def test_a_replaced_module_gains_explain_and_warmup(device: str) -> None:
    layer = nn.TransformerDecoderLayer(32, 2, 48).to(device)
    fuse(layer, backend="triton", recompute=True)
    assert (layer.backend, layer.recompute) == ("triton", True)
    plan = str(layer.explain(64))
    assert "linear1 Linear, activation relu" in plan
    assert layer.warmup(4) > 0
    layer.backend = "reference"
    x = sequences()[0].to(device)
    with count_launches() as launches:
        layer(x, x)
    assert launches == {}


class Block(nn.Module):
    """A user's block, y = x + down(gelu(up(x)))."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


def add_input(block: Block, output: Tensor, x: Tensor) -> Tensor:
    return x + output


@pytest.fixture
def _own_patterns() -> Iterator[None]:
    """After a test, remove the patterns that it registered."""
    before = dict(PATTERNS)
    yield
    PATTERNS.clear()
    PATTERNS.update(before)


@pytest.mark.usefixtures("_own_patterns")
def test_users_add_a_pattern(device: str) -> None:
    model = nn.ModuleDict({"block": Block()}).to(device)
    assert fuse(model).replaced == ()
    register_pattern(Block, ["up", "act", "down"], finish=add_input)
    x = torch.randn(5, 8, device=device)
    expected = model.block(x)
    assert [entry.name for entry in fuse(model, backend="triton").replaced] == ["block"]
    with count_launches() as launches:
        torch.testing.assert_close(model.block(x), expected, rtol=1e-5, atol=1e-5)
    assert launches == {"network_forward_kernel": 1}
    with pytest.raises(TypeError, match="positional argument"):
        model.block(x, x)
    pickled = pickle.dumps(model)
    del PATTERNS[import_path(Block)]
    with pytest.raises(RuntimeError, match=r"Block was fused by a pattern that is not registered here"):
        pickle.loads(pickled)


@pytest.mark.usefixtures("_own_patterns")
def test_a_class_that_no_longer_matches_its_pattern_is_not_fused() -> None:
    register_pattern(import_path(Block), ["up", "act", "down"])
    more, fewer = Block(), Block()
    more.scale = nn.Linear(1, 1)
    del fewer.act
    for block, reason in (
        (more, "it has a scale (Linear), which the pattern does not have"),
        (fewer, "'Block' object has no attribute 'act'"),
    ):
        report = fuse(block)
        assert report.replaced == ()
        assert reason in str(report)
        assert f"the pattern is for another version of {__name__}" in str(report)


@pytest.mark.usefixtures("_own_patterns")
def test_a_pattern_takes_precedence_over_nn_sequential(device: str) -> None:
    class Residual(nn.Sequential):
        pass

    x = torch.randn(5, 8, device=device)
    model = Residual(nn.Linear(8, 8), nn.ReLU()).to(device)
    expected = model(x)
    for _ in range(2):
        assert "0 + relu" in str(fuse(model, backend="triton"))
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        unfuse(model)
        if import_path(Residual) not in PATTERNS:
            register_pattern(Residual, ["0", "1"], finish=add_input)
            expected = expected + x


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        (("Block", ["up"]), TypeError, "target is 'Block'; it needs to be an nn.Module class or its full name"),
        ((3, ["up"]), TypeError, "target is 3"),
        (("timm.layers.mlp.Mlp", ["fc1"]), ValueError, "target timm.layers.mlp.Mlp has a pattern already"),
        ((Block, "up"), TypeError, "chain is 'up'; it needs to be a list of attribute names"),
        ((Block, [3]), TypeError, "chain is [3]"),
        ((Block, []), ValueError, "chain is empty"),
        ((Block, ["up"], {"method": "ff"}), ValueError, "method is 'ff', but Block has no such method"),
        ((Block, ["up"], {"method": 1}), TypeError, "method is 1"),
        ((Block, ["up"], {"finish": 1}), TypeError, "finish is 1; it needs to be a function"),
        ((Block, ["up"], {"within": {"up": 1}}), TypeError, "within['up'] is 1"),
    ],
    ids=["name", "target", "taken", "string", "numbers", "empty", "no method", "method", "finish", "within"],
)
def test_a_bad_pattern_gives_one_sentence(arguments: Any, error: Any, sentence: str) -> None:
    target, chain, *keywords = arguments
    before = dict(PATTERNS)
    with pytest.raises(error, match=re.escape(sentence)):
        register_pattern(target, chain, **(keywords[0] if keywords else {}))
    assert before == PATTERNS
