"""Arguments of the constructors: numbers of NumPy and torch, functions as activations, and widths of 0."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlp_fused import FusedLinear, FusedMLP, capture_step, linear_act, mlp
from mlp_fused.kernels.launch import count_launches
from mlp_fused.module import Pointwise
from mlp_fused.train.predict import predict
from mlp_fused.transfer import measure

PLAIN = FusedMLP(4, [8, 3], dropout=0.5)

NUMBERS: dict[str, Callable[[], FusedMLP]] = {
    "numpy integers": lambda: FusedMLP(np.int64(4), [np.int32(8), np.uint8(3)], dropout=np.float32(0.5)),
    "array": lambda: FusedMLP(np.array(4), np.array([8, 3]), dropout=np.array(0.5)),
    "tensor": lambda: FusedMLP(torch.tensor(4), torch.tensor([8, 3]), dropout=torch.tensor(0.5)),
    "labels": lambda: FusedMLP(4, [8, torch.tensor([0, 2, 1]).max() + 1], dropout=np.float64(0.5)),
    "numpy labels": lambda: FusedMLP(4, (8, np.array([0, 2, 1]).max() + 1), dropout=0.5),
}


def stored(module: nn.Module) -> list[tuple[type, object]]:
    """The type and value of every plain attribute of a module and its children."""
    return [
        (type(value), value)
        for child in module.modules()
        for name, value in vars(child).items()
        if not name.startswith("_") and not isinstance(value, nn.Module)
    ]


@pytest.mark.parametrize("make", NUMBERS.values(), ids=NUMBERS)
def test_numbers_of_numpy_and_torch_are_stored_as_pythons_own(make: Callable[[], FusedMLP]) -> None:
    model = make()
    assert repr(model) == repr(PLAIN)
    assert stored(model) == stored(PLAIN)
    model.load_state_dict(PLAIN.state_dict())
    x = torch.randn(5, 4)
    assert torch.equal(model.eval()(x), nn.Sequential(*copy.deepcopy(PLAIN)).eval()(x))
    assert b"numpy" not in pickle.dumps(nn.Sequential(*model.children()))


def test_a_norm_is_called_with_its_width_as_an_int() -> None:
    widths: list[object] = []

    def norm(width: int) -> nn.Module:
        widths.append(width)
        return nn.LayerNorm(width)

    FusedMLP(4, np.arange(8, 2, -2), norm)
    assert [(type(width), width) for width in widths] == [(int, 8), (int, 6)]


def test_a_linear_with_numpy_numbers_loads_with_weights_only() -> None:
    layer = FusedLinear(np.int64(4), torch.tensor(3), activation="relu")
    assert repr(layer) == repr(FusedLinear(4, 3, activation="relu"))
    assert stored(layer.linear) == stored(nn.Linear(4, 3))
    file = io.BytesIO()
    torch.save(layer.linear, file)
    file.seek(0)
    with torch.serialization.safe_globals([nn.Linear]):
        assert torch.load(file, weights_only=True).in_features == 4


def test_an_activations_parameter_may_be_a_numpy_number() -> None:
    activation = Pointwise("leaky_relu", negative_slope=np.float32(0.25)).activation
    assert type(activation.values[0]) is float
    assert activation.values == (0.25,)


def test_batch_sizes_may_be_numpy_or_torch_numbers(device: str) -> None:
    model = FusedMLP(4, [5, 3], backend="triton", device=device)
    for eight in (np.int64(8), torch.tensor(8)):
        plan = model.explain(eight)
        assert str(plan) == str(model.explain(8))
        assert type(plan.rows) is int
        with count_launches() as launches:
            model.warmup(eight, training=False)
        assert sum(launches.values()) > 0


@pytest.mark.parametrize("sizes", [np.arange(1, 3), torch.tensor([1, 2])], ids=["array", "tensor"])
def test_sizes_to_measure_may_be_an_array_or_a_tensor(sizes: Any) -> None:
    measurement = measure(nn.Linear(2, 2), torch.ones(2, 2), sizes=sizes, device="cpu", seconds=1e-4)
    assert [(type(point.rows), point.rows) for point in measurement.points] == [(int, 1), (int, 2)]


def captured(warmup: Any) -> object:
    optimizer = torch.optim.SGD(PLAIN.parameters())
    return capture_step(PLAIN, nn.MSELoss(), optimizer, torch.ones(1, 4), torch.ones(1, 3), warmup=warmup)


BAD_NUMBERS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "bool": (lambda: FusedMLP(True, [3]), TypeError, "in_channels is True; it needs to be a whole number, 0 or more"),
    "numpy bool": (
        lambda: FusedLinear(np.bool_(True), 3),
        TypeError,
        "in_features is .*True.*; it needs to be a whole",
    ),
    "bool tensor": (
        lambda: FusedMLP(4, torch.tensor([True])),
        TypeError,
        r"hidden_channels\[0\] is tensor\(True\); it",
    ),
    "float array": (
        lambda: FusedMLP(4, np.array([8.0, 3.0])),
        TypeError,
        r"hidden_channels\[0\] is .*8\.0.*; it needs",
    ),
    "float tensor": (lambda: FusedLinear(4, torch.tensor(3.0)), TypeError, r"out_features is tensor\(3\.\); it needs"),
    "an array of rows": (
        lambda: FusedMLP(4, np.array([[8, 3]])),
        TypeError,
        r"hidden_channels\[0\] is array\(\[8, 3\]\); ",
    ),
    "one number": (
        lambda: FusedMLP(4, np.array(8)),
        TypeError,
        r"hidden_channels is array\(8\); it needs to be a sequence",
    ),
    "one tensor": (
        lambda: FusedMLP(4, torch.tensor(8)),
        TypeError,
        r"hidden_channels is tensor\(8\); it needs to be a seq",
    ),
    "empty array": (lambda: FusedMLP(4, np.array([], int)), ValueError, "hidden_channels is empty; it needs one width"),
    "negative": (
        lambda: FusedMLP(4, np.array([8, -1])),
        ValueError,
        r"hidden_channels\[1\] is -1; it needs to be 0 or more",
    ),
    "dropout bool": (
        lambda: FusedMLP(4, [3], dropout=True),
        TypeError,
        "dropout is True; it needs to be a probability",
    ),
    "dropout bool tensor": (
        lambda: FusedMLP(4, [3], dropout=torch.tensor(True)),
        TypeError,
        r"dropout is tensor\(True\); it",
    ),
    "dropout above 1": (
        lambda: FusedMLP(4, [3], dropout=np.float32(1.5)),
        ValueError,
        "dropout is 1.5; it needs to be a pro",
    ),
    "dropout NaN": (
        lambda: FusedMLP(4, [3], dropout=torch.tensor(torch.nan)),
        ValueError,
        "dropout is nan; it needs to be a",
    ),
    "dropouts": (
        lambda: FusedMLP(4, [3], dropout=np.array([0.5, 0.1])),
        TypeError,
        r"dropout is array\(\[0.5, 0.1\]\); it needs",
    ),
    "rows": (
        lambda: PLAIN.explain(np.float64(8)),
        ValueError,
        "batch_size is .*8.0.*; it needs to be a number of rows, 0 or more",
    ),
    "warmup": (
        lambda: PLAIN.warmup(torch.tensor(0)),
        ValueError,
        r"batch_size is tensor\(0\); it needs to be a number of rows, 1",
    ),
    "predict": (
        lambda: predict("none.pt", np.ones((2, 2)), batch_size=0),
        Exception,
        "batch_size is 0; it needs to be a whole number",
    ),
    "slope": (
        lambda: Pointwise("leaky_relu", negative_slope=True),
        TypeError,
        "negative_slope is True; it needs to be a number",
    ),
    "steps": (lambda: captured(np.bool_(True)), TypeError, "warmup is .*True.*; it needs to be a number of steps"),
}


@pytest.mark.parametrize("name", BAD_NUMBERS)
def test_a_bad_number_is_refused_in_one_sentence(name: str) -> None:
    call, kind, sentence = BAD_NUMBERS[name]
    with pytest.raises(kind, match=f"{sentence}") as raised:
        call()
    assert "\n" not in str(raised.value)


FUNCTIONS: dict[str, tuple[Callable[..., Any], str | nn.Module]] = {
    "F.relu": (F.relu, "relu"),
    "torch.relu": (torch.relu, "relu"),
    "torch.tanh": (torch.tanh, "tanh"),
    "F.gelu": (F.gelu, "gelu"),
    "tanh gelu": (partial(F.gelu, approximate="tanh"), "gelu_tanh"),
    "F.leaky_relu": (partial(F.leaky_relu, negative_slope=0.2), nn.LeakyReLU(0.2)),
    "torch.exp": (torch.exp, "exp"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_activation_may_be_a_torch_function(name: str, device: str) -> None:
    function, same = FUNCTIONS[name]
    x = torch.randn(3, 4, device=device)
    weight = torch.randn(5, 4, device=device)
    model, other = (
        FusedMLP(4, [5, 6, 2], activation_layer=activation, output_activation=activation, backend="triton").to(device)
        for activation in (function, same)
    )
    assert repr(model) == repr(other)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), other(x), rtol=0, atol=0)
    layer = FusedLinear(4, 5, activation=function)
    assert layer.activation is FusedLinear(4, 5, activation=same).activation
    assert torch.equal(linear_act(x, weight, None, function), linear_act(x, weight, None, same))
    torch.testing.assert_close(mlp(x, [weight], None, None, function), function(F.linear(x, weight)))


def test_inplace_reaches_the_module_of_a_function() -> None:
    assert FusedMLP(4, [5, 2], activation_layer=F.relu, inplace=True)[1].inplace
    assert repr(FusedMLP(4, [5, 2], activation_layer=torch.tanh, inplace=True)[1]) == "Tanh()"


def test_a_factory_of_modules_is_accepted_as_activation() -> None:
    makers: list[Callable[..., nn.Module]] = [lambda: nn.PReLU(), partial(nn.PReLU, 5), nn.Softsign]
    for make in makers:
        assert type(FusedMLP(4, [5, 2], activation_layer=make)[1]) is type(make())


NEEDS = r"; it needs to be an nn\.Module class or instance, a name, or an activation function, such as torch\.relu$"
BAD_ACTIVATIONS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "torch.cos": (
        lambda: FusedMLP(4, [5, 2], activation_layer=torch.cos),
        TypeError,
        r"^activation_layer is the function cos, which makes no module when called without arguments \(cos\(\) .*\)"
        + NEEDS,
    ),
    "partial": (
        lambda: FusedMLP(4, [5, 2], output_activation=partial(F.softmax, dim=-1)),
        TypeError,
        r"^output_activation is the function softmax, which makes no module when called without arguments \(.*\)"
        + NEEDS,
    ),
    "a function that returns another thing": (
        lambda: FusedMLP(4, [5, 2], activation_layer=lambda: "relu"),
        TypeError,
        r"^activation_layer is the function <lambda>, .* without arguments \(it returned str\)" + NEEDS,
    ),
    "a norm that is no module": (
        lambda: FusedMLP(4, [5, 2], norm_layer=lambda width: width),
        TypeError,
        "^norm_layer returned int; it needs to return an nn.Module$",
    ),
    "inplace": (
        lambda: FusedMLP(4, [5, 2], activation_layer=nn.GELU, inplace=True),
        TypeError,
        r"^activation_layer is the class GELU, which makes no module when called with inplace=True \(.*inplace.*\)"
        + NEEDS,
    ),
    "a class with arguments": (
        lambda: FusedMLP(4, [5, 2], activation_layer=nn.Threshold),
        TypeError,
        r"^activation_layer is the class Threshold, which makes no module when called without arguments \(.*\)" + NEEDS,
    ),
    "linear": (
        lambda: FusedLinear(4, 3, activation=torch.cos),
        ValueError,
        "^activation is the function cos, which has no kernel; it needs to be one of: identity, relu, ",
    ),
}


@pytest.mark.parametrize("name", BAD_ACTIVATIONS)
def test_a_bad_activation_is_refused_in_one_sentence(name: str) -> None:
    call, kind, sentence = BAD_ACTIVATIONS[name]
    with pytest.raises(kind, match=sentence) as raised:
        call()
    assert "\n" not in str(raised.value)


EMPTY: dict[str, tuple[int, list[int]]] = {
    "hidden": (4, [0, 3]),
    "input": (0, [5, 3]),
    "output": (4, [5, 0]),
    "all": (0, [0, 0]),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("name", EMPTY)
def test_widths_of_0_give_torchs_results(name: str, device: str) -> None:
    width, widths = EMPTY[name]
    model = FusedMLP(width, widths, device=device)
    twin = nn.Sequential(*(type(child)(**options(child)) for child in model)).to(device)
    twin.load_state_dict(model.state_dict())
    results = []
    for network in (model, twin):
        x = torch.linspace(-1, 1, 5 * width, device=device).reshape(5, width).requires_grad_()
        with count_launches() as launches:
            y = network(x)
            gradients = torch.autograd.grad(y.sum(), [x, *network.parameters()])
        assert launches == {}
        results.append((y, *gradients))
    for ours, theirs in zip(*results):
        assert ours.shape == theirs.shape
        assert torch.equal(ours, theirs)


def options(child: nn.Module) -> dict[str, Any]:
    """The constructor arguments of a child."""
    return {name: getattr(child, name) for name in ("in_features", "out_features", "p") if hasattr(child, name)}


@pytest.mark.parametrize(("in_features", "out_features"), [(0, 3), (3, 0)])
def test_a_linear_of_width_0_warns_as_torchs_does(in_features: int, out_features: int, device: str) -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        layer = FusedLinear(in_features, out_features, activation="sigmoid", device=device)
    x = torch.randn(5, in_features, device=device)
    assert torch.equal(layer(x), torch.sigmoid(layer.linear(x)))
    assert layer(x).shape == (5, out_features)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_a_width_of_0_is_the_reason_in_explain() -> None:
    model = FusedMLP(4, [0, 3])
    for device in ("NVIDIA H100", "AMD MI300X"):
        plan = model.explain(8, device=device)
        assert (plan.path, plan.reason) == ("reference", "a width is zero")
        assert "a width is zero" in str(plan)
    assert model.warmup(8) >= 0
    model.backend = "triton"
    with pytest.raises(RuntimeError, match='backend is "triton", but a width is zero; backend="auto" runs plain torch'):
        model(torch.ones(2, 4))


class Residual(nn.Sequential):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input + super().forward(input)


class Backwards(nn.Sequential):
    def __iter__(self) -> Iterator[nn.Module]:
        return reversed([*super().__iter__()])


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda model: model.__setattr__("__class__", Residual), "a forward of its own"),
        (lambda model: model.__setattr__("__class__", Backwards), "a forward of its own"),
        (lambda model: model.__setattr__("forward", model[0].forward), "hooks, or a forward patched onto it"),
        (lambda model: model.register_forward_hook(lambda *_: None), "hooks, or a forward patched onto it"),
        (lambda model: model.register_state_dict_post_hook(lambda *_: None), "hooks, or a forward patched onto it"),
        (lambda model: model.register_buffer("mean", torch.zeros(4)), "parameters, buffers or extra state"),
        (lambda model: model.register_parameter("scale", nn.Parameter(torch.ones(4))), "parameters, buffers or extra"),
    ],
)
def test_from_sequential_refuses_more_than_children(change: Callable[[nn.Module], object], found: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    change(model)
    with pytest.raises(ValueError, match=f"sequential has {found}.*, and from_sequential takes only its children"):
        FusedMLP.from_sequential(model)
    assert torch.equal(FusedMLP.from_sequential(nn.Sequential(*model.children()))[0].weight, model[0].weight)
