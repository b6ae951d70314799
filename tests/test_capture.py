"""`capture_step`, and the conditions that a CUDA graph sets for a step.

The capture itself needs a GPU. Everything around it is checked without one, by a stand-in for the graph. The stand-in
runs the step while it "captures" (a real graph only records), and again in every replay, in the same memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from captured_steps import OPTIMIZERS, assert_equal, batches, network, plain_step, training_state
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mlp_fused import capture, capture_step


class StandIn:
    """A graph that records the function instead of its kernels.

    Like a CUDA graph, it writes to the tensors that the optimizer's state had at the capture, even if the optimizer has
    replaced them since.
    """

    def __init__(self, device: torch.device) -> None:
        self.warmed_up = 0

    def warm_up(self, function: Callable[[], Any]) -> None:
        function()
        self.warmed_up += 1

    def capture(self, function: Callable[[], Any]) -> Any:
        self.function = function
        self.results = function()
        self.state = {parameter: dict(values) for parameter, values in function.__self__.optimizer.state.items()}
        return self.results

    def replay(self) -> None:
        state = self.function.__self__.optimizer.state
        current = dict(state)
        state.clear()
        state.update(self.state)
        values = self.function()
        state.clear()
        state.update(current)
        for memory, value in zip(self.results, values):
            if memory is not None:
                memory.copy_(value)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_CudaGraph", StandIn)
    monkeypatch.setattr(capture, "_check_device", lambda optimizer, x: None)


FOLLOWS = ("fused SGD", "fused Adam", "amsgrad")  # optimizers whose replays follow the learning rate


@pytest.mark.parametrize("before", [0, 2], ids="after {} steps".format)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replays_train_like_a_plain_loop(name: str, before: int, stand_in: None) -> None:
    results = []
    for captured in (True, False):
        model = network()
        optimizer = OPTIMIZERS[name](model.parameters())
        step = plain_step(model, optimizer)
        torch.manual_seed(3)
        (first, *_), data = list(batches(before + 1)), list(batches(before + 5))
        for x, y in data[:before]:
            step(x, y)
        if captured:
            step = capture_step(model, cross_entropy, optimizer, *first)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5) if name in FOLLOWS else None
        losses = []
        for x, y in data[before:]:
            losses.append(step(x, y).clone())
            if scheduler is not None:
                scheduler.step()
        results.append((losses, training_state(model, optimizer)))
    assert_equal(*results)


def trained_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that a step changes: parameters, buffers and the optimizer's state."""
    state = [tensor for values in optimizer.state.values() for tensor in values.values()]
    return [*model.parameters(), *model.buffers(), *state]


def test_a_capture_changes_nothing(stand_in: None) -> None:
    for before in (0, 1):
        model = network()
        optimizer = OPTIMIZERS["fused Adam"](model.parameters())
        (x, y), *_ = batches(1)
        for _ in range(before):
            plain_step(model, optimizer)(x, y)
        model[0].bias.grad = gradient = torch.ones(16)
        state, mapping = training_state(model, optimizer), optimizer.state
        tensors = trained_tensors(model, optimizer)
        step = capture_step(model, cross_entropy, optimizer, x, y, warmup=np.int64(4))
        assert step._graph.warmed_up == 4
        assert_equal(training_state(model, optimizer), state)
        assert model[0].bias.grad is gradient
        assert optimizer.state is mapping
        assert list(map(id, trained_tensors(model, optimizer))) == list(map(id, tensors))


class Counts(torch.optim.SGD):
    """An optimizer that counts its steps in Python."""

    def step(self, closure: None = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["count"] = self.state[parameter].get("count", 0) + 1
        super().step()


class Replaces(nn.Linear):
    """A layer whose running mean is a new tensor in every step."""

    def __init__(self) -> None:
        super().__init__(12, 5)
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return y


class Lazy(nn.Linear):
    """A layer whose first forward creates a buffer."""

    def __init__(self) -> None:
        super().__init__(12, 5)
        self.register_buffer("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = torch.ones(5)
        return super().forward(x) * self.scale


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 2**-7, fused=True)


class Fails(StandIn):
    def capture(self, function: Callable[[], Any]) -> Any:
        super().capture(function)
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand much more")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


def failing_loss(calls: int) -> Callable[[Tensor, Tensor], Any]:
    """A loss that fails in its nth call."""
    remaining = [calls]

    def loss(output: Tensor, y: Tensor) -> Tensor:
        remaining[0] -= 1
        if remaining[0] == 0:
            raise KeyError("no such label")
        return cross_entropy(output, y)

    return loss


FAILURES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], torch.optim.Optimizer], Any, type[Exception], str]] = {
    "the capture": (network, adam, lambda: cross_entropy, RuntimeError, "^the step cannot be captured: RuntimeError: operation not permitted when stream is capturing; if a variable still holds a loss or an output of an earlier step, del it first$"),
    "the loss, warming up": (network, adam, lambda: failing_loss(2), KeyError, "no such label"),
    "the loss, capturing": (network, adam, lambda: failing_loss(4), RuntimeError, "the step cannot be captured: KeyError: 'no such label'$"),
    "no loss": (network, adam, lambda: lambda output, y: 0.5, TypeError, "loss_fn returned float; it needs to return the loss, a tensor"),
    "counted in Python": (network, lambda model: Counts(model.parameters(), 0.1), lambda: cross_entropy, RuntimeError, "Counts replaces its 'count' in every step, which a graph cannot"),
    "a buffer replaced": (Replaces, adam, lambda: cross_entropy, RuntimeError, "the model's mean was removed, replaced, moved or converted by the step itself; .* change it in place"),
    "a buffer made in the first step": (Lazy, adam, lambda: cross_entropy, RuntimeError, "the model's scale was removed, replaced, moved or converted by the first step; train one step without a graph, then capture"),
}  # fmt: skip


@pytest.mark.parametrize("before", [0, 1], ids="after {} steps".format)
@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_capture_restores_everything(
    name: str, before: int, stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model, make_optimizer, make_loss, kind, sentence = FAILURES[name]
    if name == "the capture":
        monkeypatch.setattr(capture, "_CudaGraph", Fails)
    model = make_model()
    optimizer = make_optimizer(model)
    if before and not isinstance(model, Lazy):
        plain_step(model, optimizer)(*next(batches(1)))
    state = training_state(model, optimizer)
    with pytest.raises(kind, match=sentence) as raised:
        capture_step(model, make_loss(), optimizer, *next(batches(1)))
    assert "\n" not in str(raised.value)
    assert_equal(training_state(model, optimizer), state)


# Changes between two steps, and the error of the second step.
CHANGES: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "another batch size": (lambda model, optimizer, batch: batch.update(x=batch["x"][:5]), RuntimeError, r"x is \(5, 12\), torch.float32, on cpu; the step was captured for \(9, 12\), torch.float32, on cpu"),
    "another dtype": (lambda model, optimizer, batch: batch.update(y=batch["y"].int()), RuntimeError, r"y is \(9,\), torch.int32, on cpu; the step was captured for \(9,\), torch.int64"),
    "another device": (lambda model, optimizer, batch: batch.update(x=batch["x"].to("meta")), RuntimeError, "x is .* on meta; the step was captured for .* on cpu"),
    "no tensor": (lambda model, optimizer, batch: batch.update(y=[1] * 9), TypeError, "y is list; it needs to be a torch.Tensor"),
    "evaluation": (lambda model, optimizer, batch: model.eval(), RuntimeError, r"the step was captured after model.train\(\); call that"),
    "another dtype of the model": (lambda model, optimizer, batch: model.double(), RuntimeError, "the model's 0.weight was removed, replaced, moved or converted since the capture; capture the step again"),
    "another parameter": (lambda model, optimizer, batch: setattr(model[0], "weight", nn.Parameter(torch.zeros(16, 12))), RuntimeError, "the model's 0.weight was removed, replaced"),
    "another buffer": (lambda model, optimizer, batch: setattr(model[1], "running_mean", torch.zeros(16)), RuntimeError, "the model's 1.running_mean was removed, replaced"),
    "frozen": (lambda model, optimizer, batch: model[0].bias.requires_grad_(False), RuntimeError, "requires_grad of the model's 0.bias was changed since the capture"),
    "a loaded optimizer": (lambda model, optimizer, batch: optimizer.load_state_dict(optimizer.state_dict()), RuntimeError, "the optimizer's state was loaded since the capture; capture the step again"),
    "another layer": (lambda model, optimizer, batch: model.__setitem__(0, nn.Linear(12, 16)), RuntimeError, "the model's module 0 was added, removed or replaced since the capture; capture the step again"),
    "one more layer": (lambda model, optimizer, batch: model.append(nn.ReLU()), RuntimeError, "the model's module 10 was added, removed"),
    "one layer less": (lambda model, optimizer, batch: model.__delitem__(-1), RuntimeError, "the model's module 9 was added, removed"),
    "one more parameter": (lambda model, optimizer, batch: model[2].register_parameter("scale", nn.Parameter(torch.ones(1))), RuntimeError, "a parameter or a buffer was added or removed since the capture"),
    "one more buffer": (lambda model, optimizer, batch: model.register_buffer("scale", torch.ones(1)), RuntimeError, "a parameter or a buffer was added or removed since the capture"),
    "a buffer that was None": (lambda model, optimizer, batch: setattr(model[1], "running_bias", torch.ones(16)), RuntimeError, "the model's 1.running_bias was added since the capture"),
    "one parameter less": (lambda model, optimizer, batch: delattr(model[0], "bias"), RuntimeError, "the model's 0.bias was removed"),
    "a frozen BatchNorm": (lambda model, optimizer, batch: model[1].eval(), RuntimeError, "the model's 1.training was changed from True to False since the capture"),
    "another p": (lambda model, optimizer, batch: setattr(model[3], "p", 0.9), RuntimeError, "the model's 3.p was changed from 0.3 to 0.9 since the capture"),
    "no p": (lambda model, optimizer, batch: delattr(model[3], "p"), RuntimeError, "the model's 3.p was changed from 0.3 to None since the capture"),
    "cleared state": (lambda model, optimizer, batch: optimizer.state.clear(), RuntimeError, "the optimizer's state was removed since the capture"),
    "one optimized parameter less": (lambda model, optimizer, batch: optimizer.param_groups[0]["params"].pop(), RuntimeError, "the optimizer's parameters were changed since the capture"),
    "another optimized parameter": (lambda model, optimizer, batch: optimizer.param_groups[0]["params"].__setitem__(0, nn.Parameter(torch.zeros(16, 12))), RuntimeError, "the optimizer's parameters were changed"),
    "no group": (lambda model, optimizer, batch: optimizer.param_groups.clear(), RuntimeError, "a parameter group was added, removed or replaced"),
    "a replaced group": (lambda model, optimizer, batch: optimizer.param_groups.__setitem__(0, dict(optimizer.param_groups[0])), RuntimeError, "a parameter group was added, removed or replaced"),
    "another group": (lambda model, optimizer, batch: optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]}), RuntimeError, "a parameter group was added"),
    "weight decay": (lambda model, optimizer, batch: optimizer.param_groups[0].update(weight_decay=0.1), RuntimeError, "the optimizer's weight_decay was changed from 0 to 0.1 since the capture"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_changes_that_a_replay_cannot_see_are_refused(name: str, stand_in: None) -> None:
    change, kind, sentence = CHANGES[name]
    model = network()
    model[1].register_buffer("running_bias", None)
    optimizer = adam(model)
    first, second = batches(2)
    step = capture_step(model, cross_entropy, optimizer, *first)
    step(*first)
    batch = dict(zip("xy", second))
    change(model, optimizer, batch)

    def state() -> list[Any]:
        gradients = [parameter.grad for parameter in model.parameters()]
        states = [model.state_dict(), list(optimizer.state.values()), gradients, torch.get_rng_state()]
        return copy.deepcopy(states)

    before = state()
    with pytest.raises(kind, match=sentence):
        step(**batch)
    assert_equal(state(), before)


def test_a_change_of_the_loss_is_refused(stand_in: None) -> None:
    model, loss_fn, batch = network(), nn.CrossEntropyLoss(), next(batches(1))
    step = capture_step(model, loss_fn, adam(model), *batch)
    loss_fn.label_smoothing = 0.1
    with pytest.raises(
        RuntimeError, match=r"^loss_fn's label_smoothing was changed from 0\.0 to 0\.1 since the capture"
    ):
        step(*batch)


def test_a_counter_that_the_step_changes_is_accepted(stand_in: None) -> None:
    class Counted(nn.Linear):
        calls = None

        def forward(self, x: Tensor) -> Tensor:
            self.calls = (self.calls or 0) + 1
            return super().forward(x)

    model, batch = Counted(12, 5), next(batches(1))
    step = capture_step(model, cross_entropy, adam(model), *batch)
    losses = [step(*batch).item() for _ in range(3)]
    assert losses == sorted(losses, reverse=True)


def test_values_that_change_in_place_are_seen(stand_in: None) -> None:
    """Examples are load_state_dict and a change in place of a learning rate that is a tensor."""
    results = []
    for captured in (True, False):
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), torch.tensor(2.0**-7), fused=True)
        first, second, third = batches(3)
        torch.manual_seed(2)
        plain = plain_step(model, optimizer)
        step = capture_step(model, cross_entropy, optimizer, *first) if captured else plain
        step(*first)
        model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()})
        step(*second)
        optimizer.param_groups[0]["lr"].mul_(4)
        plain(*third)  # a step without the graph in between
        losses = [step(*second).clone(), step(*third).clone()]
        results.append((losses, training_state(model, optimizer)))
    assert_equal(*results)


def test_a_learning_rate_that_the_graph_cannot_read_is_refused(stand_in: None) -> None:
    model = network()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    first, second = batches(2)
    step = capture_step(model, cross_entropy, optimizer, *first)
    step(*first)
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(
        RuntimeError,
        match="the optimizer's lr was changed from 0.0625 to 0.5 since the capture; capture the step again",
    ):
        step(*second)
    capture_step(model, cross_entropy, optimizer, *second)(*second)


def test_every_step_returns_the_models_output(stand_in: None) -> None:
    model = network()
    optimizer = OPTIMIZERS["SGD with momentum"](model.parameters())
    step = capture_step(model, cross_entropy, optimizer, *next(batches(1)))
    for x, y in batches(3):
        loss = step(x, y)
        assert loss is step.loss
        torch.testing.assert_close(cross_entropy(step.output, y), loss)

    class Two(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), x

    two = Two(12, 5)
    step = capture_step(two, lambda outputs, y: cross_entropy(outputs[0], y), adam(two), *next(batches(1)))
    step(*next(batches(1)))
    assert step.output is None


def test_a_loss_with_parameters_of_its_own(stand_in: None) -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5))
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, output: Tensor, y: Tensor) -> Tensor:
            self.calls += 1
            return cross_entropy(output * self.weight, y)

    model, loss = network(), Weighted()
    optimizer = torch.optim.Adam([*model.parameters(), *loss.parameters()], 2**-7, fused=True)
    step = capture_step(model, loss, optimizer, *next(batches(1)))
    assert loss.calls == 0
    assert torch.equal(loss.weight, torch.ones(5))
    for batch in batches(3):
        step(*batch)
    assert loss.calls == 3
    assert not torch.equal(loss.weight, torch.ones(5))


def test_autocast_around_the_capture_applies_to_every_step(stand_in: None) -> None:
    results = []
    for captured in (True, False):
        model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        optimizer = OPTIMIZERS["SGD with momentum"](model.parameters())
        dtypes = set()

        def loss_fn(output: Tensor, y: Tensor, dtypes: set[torch.dtype] = dtypes) -> Tensor:
            dtypes.add(output.dtype)
            return cross_entropy(output.float(), y)

        with torch.autocast("cpu", torch.bfloat16):
            step = capture_step(model, loss_fn, optimizer, *next(batches(1)))
        losses = []
        for x, y in batches(4):
            if captured:
                losses.append(step(x, y).clone())
            else:
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = loss_fn(model(x), y)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        assert dtypes == {torch.bfloat16}
        results.append((losses, training_state(model, optimizer)))
    assert_equal(results[0][0], results[1][0])
    assert_equal(results[0][1]["model"], results[1][1]["model"])


def test_steps_within_one_autocast_use_the_new_weights(stand_in: None) -> None:
    """Autocast caches its casts until its outermost context ends, but a step in it must not use old weights."""
    model = nn.Linear(12, 5)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    batch = next(batches(1))
    with torch.autocast("cpu", torch.bfloat16):
        step = capture_step(model, cross_entropy, optimizer, *batch)
        losses = [step(*batch).item() for _ in range(5)]
        assert cross_entropy(model(batch[0]), batch[1]).item() < losses[-1]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 5


MODEL = network()
GOOD = next(batches(1))

MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no GPU": (lambda: capture_step(MODEL, cross_entropy, adam(MODEL), *GOOD), RuntimeError, "capture_step needs a CUDA device; x and the model are on cpu; "),
    "model": (lambda: capture_step(cross_entropy, cross_entropy, adam(MODEL), *GOOD), TypeError, "model is function; it needs to be an nn.Module"),
    "loss": (lambda: capture_step(MODEL, 3, adam(MODEL), *GOOD), TypeError, "loss_fn is int; it needs to be a function \\(output, y\\)"),
    "optimizer": (lambda: capture_step(MODEL, cross_entropy, None, *GOOD), TypeError, "optimizer is NoneType; it needs to be a torch.optim.Optimizer"),
    "x": (lambda: capture_step(MODEL, cross_entropy, adam(MODEL), [1], GOOD[1]), TypeError, "x is list; it needs to be a torch.Tensor"),
    "y elsewhere": (lambda: capture_step(MODEL, cross_entropy, adam(MODEL), GOOD[0], GOOD[1].to("meta")), RuntimeError, r"y is on meta, x on cpu; move it with y.to\('cpu'\)"),
    "the model elsewhere": (lambda: capture_step(MODEL, cross_entropy, adam(MODEL), *(tensor.to("meta") for tensor in GOOD)), RuntimeError, "x is on meta, the model's parameters on cpu"),
    "closure": (lambda: capture_step(MODEL, cross_entropy, torch.optim.LBFGS(MODEL.parameters()), *GOOD), RuntimeError, "the step of LBFGS calls a closure"),
    "no warm-up": (lambda: capture_step(MODEL, cross_entropy, adam(MODEL), *GOOD, warmup=0), ValueError, "warmup is 0"),
    "half a warm-up": (lambda: capture_step(MODEL, cross_entropy, adam(MODEL), *GOOD, warmup=0.5), TypeError, "warmup is 0.5"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gives_one_sentence_before_anything_runs(name: str) -> None:
    call, kind, sentence = MISTAKES[name]
    before = copy.deepcopy(MODEL.state_dict())
    with pytest.raises(kind, match=sentence) as raised:
        call()
    assert "\n" not in str(raised.value)
    assert_equal(MODEL.state_dict(), before)


def test_a_flag_that_the_optimizer_lacks_is_named() -> None:
    class OnGpu:
        is_cuda = True

    with pytest.raises(RuntimeError, match=r"Adam has capturable=False; a graph needs Adam\(..., capturable=True\)"):
        capture._check_device(torch.optim.Adam(MODEL.parameters()), OnGpu())
    capture._check_device(torch.optim.SGD(MODEL.parameters(), 0.1), OnGpu())


def test_state_that_a_graph_cannot_advance_is_refused() -> None:
    """Adagrad counts its steps on the CPU though the model is on a GPU. Here the device is only named."""
    optimizer = torch.optim.Adagrad(MODEL.parameters())
    state = dict(capture._leaves(optimizer.state))
    capture._check_state(optimizer, state, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="Adagrad keeps 'step' on cpu, where a graph cannot change it"):
        capture._check_state(optimizer, state, torch.device("cuda", 0))
