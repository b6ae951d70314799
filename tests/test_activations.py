"""The activation table: values at extreme inputs, torch's modules, and activations that users add."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlp_fused import ACTIVATIONS, FusedLinear, FusedMLP, Pointwise, linear_act, register_activation
from mlp_fused.engine.recognize import FUNCTIONS, find, look_up, resolve
from mlp_fused.kernels.activation import Activation

EXTREMES = [0.0, 1e4, -1e4, torch.inf, -torch.inf, torch.nan, 1e-30, -1e-30, 1e-4, -1e-4, 100.0, -100.0]

WANTED = (
    "identity relu leaky_relu relu6 squared_relu elu celu selu gelu gelu_tanh quick_gelu silu mish sigmoid logsigmoid "
    "tanh tanhshrink softplus softsign softshrink hardshrink hardsigmoid hardswish hardtanh exp sine step threshold"
).split()


def test_the_table_has_every_documented_activation() -> None:
    assert set(WANTED) <= set(ACTIVATIONS)


def column(values: list[float], device: str) -> torch.Tensor:
    return torch.tensor(values, device=device).unsqueeze(1)


@pytest.mark.parametrize("name", WANTED)
def test_extreme_inputs_give_torchs_values(name: str, device: str) -> None:
    """Run z = x * 1 + 0 on every extreme value, forward and backward."""
    if name == "softshrink" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):
        wanted = column([value for value in EXTREMES if value == value], device)  # older torch turns NaN into 0
    elif name == "gelu":
        wanted = column([value for value in EXTREMES if abs(value) != torch.inf], device)  # see the test below
    else:
        wanted = column(EXTREMES, device)
    one = torch.ones(1, 1, device=device)
    x = wanted.clone().requires_grad_()
    y = linear_act(x, one, None, name, backend="triton")
    torchs_x = wanted.clone().requires_grad_()
    torchs = ACTIVATIONS[name](torchs_x)
    torch.testing.assert_close(y, torchs, rtol=1e-5, atol=1e-7, equal_nan=True)
    dy = torch.randn_like(y)
    (dx,), (torchs_dx,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(torchs, torchs_x, dy)
    # At NaN torch's own CPU and CUDA kernels disagree about some gradients.
    finite = ~wanted.isnan()
    torch.testing.assert_close(dx[finite], torchs_dx[finite], rtol=1e-5, atol=1e-7, equal_nan=True)


def test_gelu_at_infinity_is_its_limit(device: str) -> None:
    """torch's own kernels disagree here: they give inf or NaN, depending on the device and the vector width."""
    x = column([torch.inf], device).requires_grad_()
    y = linear_act(x, torch.ones(1, 1, device=device), None, "gelu", backend="triton")
    assert y.item() == torch.inf
    assert torch.autograd.grad(y, x)[0].item() == 1


def test_gelu_is_about_as_accurate_as_torchs_in_fp32(device: str) -> None:
    """Compare z Φ(z) and its derivative with float64. Beyond -15 and 15, in fp32, they are 0 and 0, or z and 1."""
    z = torch.linspace(-15, 15, 30001, device=device).unsqueeze(1)
    wide = z.double()
    cdf, pdf = torch.special.ndtr(wide), torch.exp(-wide.square() / 2) / (2 * torch.pi) ** 0.5
    errors = []
    for call in (
        lambda x: linear_act(x, torch.ones(1, 1, device=device), None, "gelu", backend="triton"),
        nn.functional.gelu,
    ):
        x = z.clone().requires_grad_()
        y = call(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        errors.append([(y.detach() - wide * cdf).abs().max().item(), (dx - cdf - wide * pdf).abs().max().item()])
    (forward, backward), (torchs_forward, torchs_backward) = errors
    assert forward <= 1.1 * torchs_forward
    assert backward <= 1.1 * torchs_backward
    assert forward < 1e-6
    assert backward < 2e-7


MODULES = {
    nn.Identity(): "identity", nn.ReLU(): "relu", nn.ReLU(inplace=True): "relu", nn.LeakyReLU(0.3): "leaky_relu",
    nn.ReLU6(): "relu6", nn.ELU(0.7): "elu", nn.CELU(0.7): "celu", nn.SELU(): "selu", nn.GELU(): "gelu",
    nn.GELU("tanh"): "gelu_tanh", nn.SiLU(): "silu", nn.Mish(): "mish", nn.Sigmoid(): "sigmoid",
    nn.LogSigmoid(): "logsigmoid", nn.Tanh(): "tanh", nn.Tanhshrink(): "tanhshrink", nn.Softplus(2, 15): "softplus",
    nn.Softsign(): "softsign", nn.Softshrink(0.2): "softshrink", nn.Hardshrink(0.2): "hardshrink",
    nn.Hardsigmoid(): "hardsigmoid", nn.Hardswish(): "hardswish", nn.Hardtanh(-2, 3): "hardtanh",
    nn.Threshold(0.1, 2.0): "threshold",
}  # fmt: skip


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_is_found_with_its_own_parameters(module: nn.Module) -> None:
    activation = find(module)
    assert activation is not None
    assert activation.name == MODULES[module]
    z = torch.randn(100) * 5
    assert torch.equal(activation(z), module(z.clone()))
    assert find(type(module)() if not activation.parameters else copy.deepcopy(module)) is not None
    for name, value in activation.parameters.items():
        assert getattr(module, name) == value


@pytest.mark.parametrize("module", [nn.PReLU(), nn.RReLU(), nn.Softmax(-1), nn.GLU(), nn.Linear(1, 1)], ids=str)
def test_a_module_with_state_or_that_is_not_pointwise_is_not_found(module: nn.Module) -> None:
    assert find(module) is None
    with pytest.raises(ValueError, match=rf"activation is {type(module).__name__}.*one of: identity, relu"):
        resolve(module)


@pytest.mark.parametrize(
    ("module", "name", "value"), [(nn.CELU(), "alpha", 0.0), (nn.Hardtanh(), "min_val", 2.0)], ids=["celu", "hardtanh"]
)
def test_parameters_that_torch_refuses_give_its_error(module: nn.Module, name: str, value: float, device: str) -> None:
    model = FusedMLP(4, [3, 2], activation_layer=module, backend="triton", device=device)
    model(torch.randn(5, 4, device=device))
    setattr(model[1], name, value)
    with pytest.raises((RuntimeError, ValueError), match="alpha cannot be 0 for|min_val cannot be greater than"):
        model(torch.randn(5, 4, device=device))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_torch_function_is_found(name: str) -> None:
    function = look_up(name)
    activation = find(function)
    assert activation is ACTIVATIONS[FUNCTIONS[name]]
    z = torch.randn(100) * 5
    assert torch.equal(activation(z), function(z.clone()))


@pytest.mark.parametrize(
    ("function", "name", "parameters"),
    [
        (partial(F.gelu, approximate="tanh"), "gelu_tanh", {}),
        (partial(F.gelu, approximate="none"), "gelu", {}),
        (partial(F.leaky_relu, negative_slope=0.2, inplace=True), "leaky_relu", {"negative_slope": 0.2}),
    ],
    ids=["gelu_tanh", "gelu", "leaky_relu"],
)
def test_a_partial_function_is_found_with_its_parameters(
    function: Callable[..., Tensor], name: str, parameters: dict[str, float]
) -> None:
    activation = find(function)
    assert activation is resolve(name).bind(**parameters)
    z = torch.randn(100) * 5
    assert torch.equal(activation(z), function(z.clone()))


@pytest.mark.parametrize(
    "function",
    [
        torch.cos,
        lambda z: z,
        partial(F.relu, torch.ones(1)),
        partial(F.softmax, dim=-1),
        F.threshold,
        partial(F.gelu, approximate="erf"),
    ],
    ids=["cos", "a lambda", "partial relu", "partial softmax", "threshold", "gelu"],
)
def test_a_function_without_a_kernel_is_not_found(function: Callable[..., Tensor]) -> None:
    assert find(function) is None
    with pytest.raises(
        ValueError, match=r"^activation is the function .*, which has no kernel; it needs to be one of: id"
    ):
        resolve(function)


def test_resolve_takes_names_classes_instances_functions_and_none() -> None:
    assert resolve(None) is resolve("identity") is resolve(nn.Identity) is resolve(nn.Identity())
    assert resolve(nn.GELU) is resolve("gelu")
    assert resolve(nn.LeakyReLU(0.2)) is resolve("leaky_relu").bind(negative_slope=0.2)
    with pytest.raises(ValueError, match="activation is 'rleu'; it needs to be one of: identity, relu"):
        resolve("rleu")
    assert resolve(F.relu) is resolve(torch.relu) is resolve("relu")
    assert resolve(partial(F.leaky_relu, negative_slope=0.2)) is resolve(nn.LeakyReLU(0.2))
    with pytest.raises(
        TypeError, match="activation is int; it needs to be a name, .*, a function such as torch.relu, or"
    ):
        resolve(3)
    with pytest.raises(TypeError, match="activation is type; it needs to be a name"):
        resolve(int)
    with pytest.raises(TypeError, match="cannot be made without arguments"):
        resolve(nn.Threshold)
    with pytest.raises(TypeError, match="has no parameter 'slope'; its parameters are: negative_slope"):
        resolve("leaky_relu").bind(slope=1.0)
    with pytest.raises(TypeError, match="negative_slope is 'x'"):
        resolve("leaky_relu").bind(negative_slope="x")


@pytest.mark.parametrize("name", WANTED)
def test_reference_backward_is_the_derivative_of_reference(name: str) -> None:
    activation = ACTIVATIONS[name]
    assert (activation.saved_tensor == "preactivation") or activation.reference_backward is not None
    if activation.reference_backward is None:
        return
    z = torch.randn(500, dtype=torch.float64, requires_grad=True)
    dh = torch.randn(500, dtype=torch.float64)
    h = activation(z)
    (expected,) = torch.autograd.grad(h, z, dh)
    torch.testing.assert_close(
        activation.reference_backward(dh, h.detach(), *activation.values), expected, rtol=1e-6, atol=1e-8
    )


def test_activations_survive_pickle_and_deepcopy() -> None:
    bound = resolve("leaky_relu").bind(negative_slope=0.2)
    assert pickle.loads(pickle.dumps(bound)) is bound
    assert copy.deepcopy(bound) is bound
    for model in (FusedMLP(3, [4, 2], activation_layer="sine"), FusedLinear(3, 2, activation=nn.LeakyReLU(0.2))):
        x = torch.randn(5, 3)
        for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
            assert torch.equal(twin(x), model(x))


def test_step_at_zero_and_nan() -> None:
    z = torch.tensor([-1.0, -0.0, 0.0, 2.0, torch.nan])
    assert torch.equal(Pointwise("step")(z)[:4], torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert Pointwise("step")(z)[4].isnan()


def test_a_perceptron_learns_linearly_separable_classes(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=generator)
    side = x @ torch.tensor([1.0, -2.0]) + 0.3
    x, t = x[side.abs() > 0.2].to(device), (side[side.abs() > 0.2] > 0).float().unsqueeze(1).to(device)
    model = FusedLinear(2, 1, activation="step", device=device)
    with torch.no_grad():
        for _ in range(100):
            if torch.equal(model(x), t):
                break
            for x_i, t_i in zip(x, t):
                error = t_i - model(x_i)
                model.weight += error * x_i
                model.bias += error
        assert torch.equal(model(x), t)
        model.backend = "triton"
        assert torch.equal(model(x), t)


def test_register_refuses_wrong_arguments() -> None:
    relu = ACTIVATIONS["relu"]
    with pytest.raises(ValueError, match="'relu' is registered already"):
        register_activation("relu", relu.forward, relu.backward, reference=torch.relu)
    with pytest.raises(ValueError, match="saves is 'input'"):
        register_activation("mine", relu.forward, relu.backward, saves="input", reference=torch.relu)
    with pytest.raises(ValueError, match="has no reference_backward"):
        register_activation("mine", relu.forward, relu.backward, saves="output", reference=torch.relu)
    with pytest.raises(TypeError, match="forward is function; it needs to be a @triton.jit function"):
        register_activation("mine", lambda z: z, relu.backward, reference=torch.relu)
    with pytest.raises(TypeError, match="reference is NoneType"):
        register_activation("mine", relu.forward, relu.backward, reference=None)
    with pytest.raises(TypeError, match="name is ''"):
        register_activation("", relu.forward, relu.backward, reference=torch.relu)
    assert "mine" not in ACTIVATIONS
    assert isinstance(relu, Activation)
