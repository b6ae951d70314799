"""torch.autograd and torch.func with a FusedMLP, compared with an nn.Sequential of the same modules."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from mlp_fused import ACTIVATIONS, FusedMLP, linear_act, mlp
from mlp_fused.engine.autograd import _bounds
from mlp_fused.engine.paths import find_layers
from mlp_fused.explain import meta_layers

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
Pair = Callable[..., tuple[FusedMLP, nn.Sequential]]


@pytest.fixture
def pair(backend_of_path: str, device: str) -> Pair:
    """A function that makes a network on one of the paths, and its twin of torch's modules with copied parameters."""

    def make(*widths: int, activation: str = "gelu", **keywords: Any) -> tuple[FusedMLP, nn.Sequential]:
        first, *rest = widths or (20, 16, 4)
        model = FusedMLP(first, rest, activation_layer=activation, backend=backend_of_path, device=device, **keywords)
        return model, copy.deepcopy(nn.Sequential(*model))

    return make


def draw(device: str, *shape: int) -> Tensor:
    return torch.randn(*(shape or (9, 20)), device=device)


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None), name
        if mine.grad is not None and other.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("use_reentrant", [True, False], ids="reentrant={}".format)
def test_torch_checkpoint_reentrant_and_not(use_reentrant: bool, pair: Pair, device: str) -> None:
    model, twin = pair()
    x, dy = draw(device).requires_grad_(), draw(device, 9, 4)
    results = []
    for network, wrapped in ((model, True), (model, False), (twin, True)):
        network.zero_grad()
        x.grad = None
        y = checkpoint(network, x, use_reentrant=use_reentrant) if wrapped else network(x)
        y.backward(dy)
        results.append([y.detach(), x.grad, *(parameter.grad for parameter in network.parameters())])
    checkpointed, plain, theirs = results
    assert all(map(torch.equal, checkpointed, plain))
    for mine, other in zip(checkpointed, theirs, strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)


def test_checkpoint_draws_dropout_again(pair: Pair, device: str) -> None:
    model, _ = pair(dropout=0.5)
    x = draw(device).requires_grad_()
    leaves = [x, *model.parameters()]
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(3)
        gradients.append(torch.autograd.grad(run(x).square().sum(), leaves))
    assert all(map(torch.equal, *gradients))


def test_a_second_backward_needs_retain_graph(pair: Pair, device: str) -> None:
    model, twin = pair()
    x = draw(device)
    for network in (model, twin):
        y = network(x).square().sum()
        y.backward(retain_graph=True)
        y.backward()
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            y.backward()
    assert_same_gradients(model, twin)


def test_gradients_accumulate(pair: Pair, device: str) -> None:
    model, twin = pair()
    parts = [draw(device) for _ in range(3)]
    single = []
    for part in parts:
        model(part).square().sum().backward()
        single.append([parameter.grad for parameter in model.parameters()])
        model.zero_grad()
    for network in (model, twin):
        for part in parts:
            network(part).square().sum().backward()
    assert_same_gradients(model, twin)
    for parameter, *grads in zip(model.parameters(), *single):
        assert torch.equal(parameter.grad, grads[0] + grads[1] + grads[2])
    model.zero_grad()
    twin.zero_grad()
    for network in (model, twin):  # all forwards first, one backward
        sum(network(part).square().sum() for part in parts).backward()
    assert_same_gradients(model, twin)


TRAINABLE = ((True,) * 3, (False, True, True), (False, False, True), (True, False, False), (False,) * 3)


def test_requires_grad_changes_between_calls(pair: Pair, device: str) -> None:
    model, twin = pair(20, 16, 8, 4)
    x = draw(device)
    linears = [index for index, child in enumerate(model) if isinstance(child, nn.Linear)]
    for flags, x_requires_grad in itertools.product(TRAINABLE, (False, True)):
        inputs = []
        for network in (model, twin):
            network.zero_grad()
            for index, flag in zip(linears, flags):
                network[index].requires_grad_(flag)
            mine = x.clone().requires_grad_(x_requires_grad)
            inputs.append(mine)
            y = network(mine)
            assert y.requires_grad == (any(flags) or x_requires_grad)
            if y.requires_grad:
                y.square().sum().backward()
        assert_same_gradients(model, twin)
        assert (inputs[0].grad is None) == (inputs[1].grad is None) == (not x_requires_grad)
        if x_requires_grad:
            torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **CLOSE)


def test_no_grad_and_inference_mode(pair: Pair, device: str) -> None:
    model, twin = pair()
    x = draw(device)
    with torch.no_grad():
        y = model(x)
        with torch.enable_grad():
            assert model(x).requires_grad
    assert not y.requires_grad
    with torch.inference_mode():
        inside = model(x)
        inference_x = x + 0
        assert inside.is_inference()
        assert torch.equal(inside, model(inference_x))
    torch.testing.assert_close(inside.clone(), twin(x).detach(), **CLOSE)
    for network in (model, twin):  # inference tensors are not saved for backward
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            network(inference_x)
        network(inference_x.clone()).sum().backward()
    assert_same_gradients(model, twin)


def backward_error(y: Tensor) -> type[Exception] | None:
    """The error that a backward raises after a change in place; None if it raises none."""
    try:
        y.backward()
    except Exception as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return type(error)
    return None


def _later_weight(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
    model[3].weight.mul_(2)


def _step(model: nn.Sequential, x: Tensor, y: Tensor) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


IN_PLACE: dict[str, Callable[[nn.Sequential, Tensor, Tensor], None]] = {
    "the input": lambda model, x, y: x.mul_(2),
    "a later layer's weight": _later_weight,
    "every parameter, by an optimizer": _step,
    "a later layer's bias": lambda model, x, y: model[3].bias.mul_(2),
    "a weight's .data": lambda model, x, y: model[3].weight.data.mul_(1),  # neither torch nor the kernels detect this
}


@pytest.mark.parametrize("change", IN_PLACE)
def test_in_place_changes_of_saved_tensors_are_detected_as_by_torch(change: str, pair: Pair, device: str) -> None:
    raised = []
    for network in pair():
        x = draw(device)
        y = network(x).square().sum()
        with torch.no_grad():
            IN_PLACE[change](network, x, y)
        raised.append(backward_error(y))
    assert raised[0] == raised[1]
    assert (raised[0] is None) == ("bias" in change or ".data" in change)


MOVES: dict[str, Callable[[nn.Sequential], object]] = {
    "data": lambda model: setattr(model[3].weight, "data", model[3].weight.data * 3),
    "half": lambda model: model.half(),
    "vector_to_parameters": lambda model: nn.utils.vector_to_parameters(
        torch.cat([3 * parameter.detach().flatten() for parameter in model.parameters()]), model.parameters()
    ),
}


@pytest.mark.parametrize("change", MOVES)
def test_other_memory_of_a_weight_is_refused(change: str, backend_of_path: str, pair: Pair, device: str) -> None:
    """torch's backward reads the old memory. The kernels' cannot."""
    gradients, drawn = [], draw(device)
    for network in pair():
        x = drawn.clone().requires_grad_()
        y = network(x).square().sum()
        MOVES[change](network)
        refused = backend_of_path == "triton" and isinstance(network, FusedMLP)
        with pytest.raises(RuntimeError, match=r"^weight\[\d\] has other memory") if refused else nullcontext():
            gradients.append(*torch.autograd.grad(y, x))
    assert len(gradients) == 1 or torch.equal(*gradients)


# Activations whose output the kernels save, and torch their input. The manual lists them.
SAVED_OUTPUTS = (
    "leaky_relu", "hardtanh", "relu6", "softplus", "logsigmoid", "softsign", "softshrink", "hardshrink", "hardsigmoid",
    "step",
)  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_output_may_be_changed_in_place_if_torch_allows_it(activation: str, pair: Pair, device: str) -> None:
    model, twin = pair(output_activation=activation)
    x = draw(device)
    raised = []
    for network in (model, twin):
        y = network(x)
        y.mul_(3)
        raised.append(backward_error(y.square().sum()))
    assert (raised[1] is not None) == (activation in ("relu", "sigmoid", "tanh", "exp"))
    by_kernels = model.backend != "reference"
    assert (raised[0] is not None) == (raised[1] is not None or (by_kernels and activation in SAVED_OUTPUTS))
    if raised[0] is None:
        assert_same_gradients(model, twin)


def test_saved_tensor_hooks_pack_and_unpack_every_saved_tensor(pair: Pair, device: str) -> None:
    model, _ = pair(20, 16, 8, 4)
    x = draw(device)
    plain = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.detach().clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: packed[index]):
        y = model(x).square().sum()
    assert packed
    assert all(map(torch.equal, torch.autograd.grad(y, list(model.parameters())), plain))
    with torch.autograd.graph.save_on_cpu():
        y = model(x).square().sum()
    assert all(map(torch.equal, torch.autograd.grad(y, list(model.parameters())), plain))
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"):
        with pytest.raises(RuntimeError, match="no hooks here"), torch.autograd.graph.save_on_cpu():
            pass
        y = model(x).square().sum()
    assert all(map(torch.equal, torch.autograd.grad(y, list(model.parameters())), plain))


def _events(model: nn.Module, x: Tensor) -> tuple[list[Any], Tensor]:
    """The events that hooks on a module, its output, input and parameters see, in order, and the input's gradient."""
    events: list[Any] = []
    handles = [
        model.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        model.register_forward_pre_hook(
            lambda module, args, kwargs: events.append(("pre", args[0].shape)), with_kwargs=True
        ),
        model.register_forward_hook(lambda module, args, output: output + 1),
        model.register_forward_hook(lambda module, args, output: events.append(("forward", output.detach()))),
        model.register_full_backward_pre_hook(lambda module, grads: (grads[0] * 3,)),
        model.register_full_backward_hook(lambda module, dx, dy: events.append(("backward", dx[0], dy[0]))),
    ]
    for name, parameter in model.named_parameters():
        handles.append(
            parameter.register_hook(lambda grad, name=name: events.append((f"grad of {name}", grad)) or grad / 2)
        )
        handles.append(
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: events.append((f"has {name}", p.grad.clone()))
            )
        )
    x = x.clone().requires_grad_()
    x.register_hook(lambda grad: events.append(("input", grad)))
    y = model(x)
    y.register_hook(lambda grad: grad + 1)
    y.square().sum().backward()
    for handle in handles:
        handle.remove()
    return events, x.grad


def test_hooks_on_the_module_its_output_input_and_parameters(pair: Pair, device: str) -> None:
    model, twin = pair()
    x = draw(device)
    model(x)  # caches the path
    (ours, dx), (theirs, dx_torch) = _events(model, x), _events(twin, x)
    torch.testing.assert_close(dx, dx_torch, **CLOSE)
    assert len(ours) == len(theirs)
    # Each event occurs once. Those of the parameters occur in the order in which their gradients are ready.
    for mine, other in zip(sorted(ours, key=lambda event: event[0]), sorted(theirs, key=lambda event: event[0])):
        assert mine[0] == other[0]
        torch.testing.assert_close(list(mine[1:]), list(other[1:]), **CLOSE)
    assert [event[0] for event in ours][:2] == [event[0] for event in theirs][:2] == ["pre", "forward"]
    assert_same_gradients(model, twin)
    (_, again), (_, again_torch) = _events(model, x), _events(twin, x)
    torch.testing.assert_close(again, again_torch, **CLOSE)
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x), **CLOSE)


def test_functional_call_with_computed_weights(pair: Pair, device: str) -> None:
    """The parameters are computed, as in a hypernetwork. The tensor that they are computed from gets the gradient."""
    model, twin = pair()
    x = draw(device)
    results = []
    for network in (model, twin):
        scale = torch.full((), 1.5, device=device, requires_grad=True)
        computed = {name: parameter.detach() * scale for name, parameter in network.named_parameters()}
        y = torch.func.functional_call(network, computed, (x,))
        y.square().sum().backward()
        results.append((y, scale.grad))
        assert all(parameter.grad is None for parameter in network.parameters())
    for mine, other in zip(*results):
        torch.testing.assert_close(mine, other, **CLOSE)
    torch.testing.assert_close(model(x), twin(x), **CLOSE)  # the module's own parameters are back


def test_the_functions_with_computed_weights(pair: Pair, device: str) -> None:
    backend = pair()[0].backend
    x = draw(device)
    base = [draw(device, *shape).requires_grad_() for shape in ((16, 6), (6, 20), (16,), (4, 16))]
    gradients = []
    for chosen in (backend, "reference"):
        left, right, bias, last = base
        h = mlp(x, [left @ right / 5, last.tanh()], [bias * 2, None], "silu", backend=chosen)
        y = linear_act(h, last[:, :4].t() * 0.5, None, "tanh", backend=chosen)
        gradients.append(torch.autograd.grad(y.square().sum(), base))
    for mine, other in zip(*gradients):
        torch.testing.assert_close(mine, other, **CLOSE)


def transforms(model: nn.Module, x: Tensor) -> dict[str, Callable[[], Any]]:
    """Calls of a module under each transform of torch.func and in forward mode."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    def forward_mode() -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    two = {name: torch.stack([parameter, parameter * 2]) for name, parameter in parameters.items()}
    tangents = {name: torch.ones_like(parameter) for name, parameter in parameters.items()}
    return {
        "grad": lambda: torch.func.grad(loss)(parameters, x),
        "per-sample gradients": lambda: torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x),
        "vmap": lambda: torch.func.vmap(model)(x.unsqueeze(1)),
        "ensemble": lambda: torch.func.vmap(loss, (0, None))(two, x),
        "vjp": lambda: torch.func.vjp(model, x)[1](torch.ones_like(model(x))),
        "jvp": lambda: torch.func.jvp(model, (x,), (torch.ones_like(x),)),
        "jvp of the parameters": lambda: torch.func.jvp(lambda p: loss(p, x), (parameters,), (tangents,)),
        "jacrev": lambda: torch.func.jacrev(model)(x[:2]),
        "jacfwd": lambda: torch.func.jacfwd(model)(x[:2]),
        "hessian": lambda: torch.func.hessian(lambda x: model(x).square().sum())(x[0]),
        "forward mode": forward_mode,
    }  # fmt: skip


def _tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in (result.values() if isinstance(result, dict) else result) for tensor in _tensors(part)]


@pytest.mark.parametrize("name", transforms(nn.Linear(1, 1), torch.empty(0)))
def test_transforms_run_plain_torch(name: str, device: str) -> None:
    model = FusedMLP(6, [5, 3], activation_layer="tanh", output_activation="softplus", device=device)
    twin = copy.deepcopy(nn.Sequential(*model))
    x = draw(device, 4, 6)
    model(x)
    actual, expected = (_tensors(transforms(network, x)[name]()) for network in (model, twin))
    assert len(actual) == len(expected) > 0
    for mine, other in zip(actual, expected):
        torch.testing.assert_close(mine, other, **CLOSE)


@pytest.mark.parametrize("name", ["grad", "per-sample gradients", "jvp", "forward mode", "hessian"])
def test_backend_triton_names_the_transform_that_it_cannot_run_under(name: str, device: str) -> None:
    model = FusedMLP(6, [5, 3], activation_layer="tanh", backend="triton", device=device)
    x = draw(device, 4, 6)
    model(x)
    with pytest.raises(RuntimeError, match="a torch.func transform is active|forward-mode differentiation is active"):
        transforms(model, x)[name]()
    assert model(x).shape == (4, 3)


def test_second_derivatives_through_the_module(pair: Pair, device: str) -> None:
    """A gradient penalty, as in WGAN-GP, and a Hessian-vector product."""
    model, twin = pair(activation="tanh")
    x, v = draw(device), draw(device)
    products = []
    for network in (model, twin):
        mine = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(network(mine).square().sum(), mine, create_graph=True)
        products.append(torch.autograd.grad(dx, mine, v, retain_graph=True)[0])
        (dx.norm(dim=1) - 1).square().mean().backward()
    torch.testing.assert_close(*products, **CLOSE)
    assert_same_gradients(model, twin)


def test_gradgradcheck_of_the_module(device: str) -> None:
    """The interpreted kernels compute in float64."""
    for backend in ("triton" if device == "cpu" else "auto", "reference"):
        model = FusedMLP(3, [4, 2], activation_layer="silu", backend=backend, device=device, dtype=torch.float64)
        x = torch.randn(2, 3, dtype=torch.float64, device=device, requires_grad=True)
        names = [name for name, _ in model.named_parameters()]

        def call(x: Tensor, *values: Tensor, model: nn.Module = model, names: list[str] = names) -> Tensor:
            return torch.func.functional_call(model, dict(zip(names, values)), (x,))

        assert torch.autograd.gradcheck(call, (x, *model.parameters()), fast_mode=True)
        assert torch.autograd.gradgradcheck(call, (x, *model.parameters()), fast_mode=True)


@pytest.mark.parametrize("needs", ["x", "biases", "x and biases", "last layer", "last bias"])
@pytest.mark.parametrize("widths", [(300,), (300, 5), (4, 5)], ids=["one layer", "two layers", "one kernel"])
@pytest.mark.parametrize("activation", ["identity", "relu", "tanh", "gelu"])
def test_second_derivatives_with_frozen_weights(
    activation: str, widths: tuple[int, ...], needs: str, device: str
) -> None:
    """On the layer path, each layer is then an autograd.Function, and the first saves no input if it can."""
    options: dict[str, Any] = {"activation_layer": "tanh", "output_activation": activation, "device": device}
    model = FusedMLP(3, list(widths), backend="triton", **options)
    twin = nn.Sequential(*copy.deepcopy(model))
    x = draw(device, 6, 3)
    results = []
    for network in (model, twin):
        own = x.clone().requires_grad_(needs.startswith("x"))
        *_, (_, weight), (_, bias) = network.requires_grad_(False).named_parameters()
        biases = [parameter for name, parameter in network.named_parameters() if name.endswith("bias")]
        wanted = {
            "x": [own], "biases": biases, "x and biases": [own, *biases], "last layer": [weight, bias],
            "last bias": [bias],
        }[needs]  # fmt: skip
        for tensor in wanted:
            tensor.requires_grad_()
        y = network(own)
        dy = torch.cos(torch.arange(y.numel(), device=device).view_as(y)).requires_grad_()
        first = torch.autograd.grad(y, wanted, dy, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        results.append(
            (*first, *torch.autograd.grad(penalty, [dy, *wanted], allow_unused=True, materialize_grads=True))
        )
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)


@pytest.mark.parametrize(
    ("width", "rows", "dtype", "functions"),
    [
        (512, 16384, torch.bfloat16, 1),
        (1024, 16384, torch.float16, 1),  # kernels of 0.83 ms on an H200; Python takes longer with a Function per layer
        (1024, 32768 + 1, torch.float16, 4),
        (1024, 8192, torch.float32, 1),
        (1024, 8192 + 1, torch.float32, 4),
    ],
    ids=str,
)
def test_the_number_of_autograd_functions_follows_the_kernels_time(
    width: int, rows: int, dtype: torch.dtype, functions: int
) -> None:
    layers = meta_layers((width,) * 5, [ACTIVATIONS["relu"]] * 4, dtype)
    path = find_layers(torch.empty(1, width, device="meta"), layers, dtype, "triton", "ieee")
    assert len(_bounds(path, rows, 0, True)) == functions + 1
