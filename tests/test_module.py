"""FusedMLP and FusedLinear as replacements of torchvision.ops.MLP, nn.Sequential and nn.Linear."""

from __future__ import annotations

import copy
import itertools
import pickle
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from mlp_fused import ACTIVATIONS, FusedLinear, FusedMLP, Pointwise, linear_act, mlp
from mlp_fused.engine.paths import why_reference
from mlp_fused.engine.recognize import find
from mlp_fused.engine.runs import Decision
from mlp_fused.engine.settings import TensorGuards
from mlp_fused.kernels.activation import Activation
from mlp_fused.kernels.launch import count_launches


def torchvision_mlp(
    in_channels: int,
    hidden_channels: list[int],
    norm_layer: Callable[..., nn.Module] | None = None,
    activation_layer: Callable[..., nn.Module] = nn.ReLU,
    inplace: bool | None = None,
    bias: bool = True,
    dropout: float = 0.0,
) -> nn.Sequential:
    """The children of torchvision.ops.MLP, in its order."""
    keywords = {} if inplace is None else {"inplace": inplace}
    children: list[nn.Module] = []
    for width_in, width_out in itertools.pairwise([in_channels, *hidden_channels[:-1]]):
        children.append(nn.Linear(width_in, width_out, bias=bias))
        children += [norm_layer(width_out)] if norm_layer else []
        children += [activation_layer(**keywords), nn.Dropout(dropout, **keywords)]
    children += [nn.Linear([in_channels, *hidden_channels][-2], hidden_channels[-1], bias=bias)]
    return nn.Sequential(*children, nn.Dropout(dropout, **keywords))


ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"norm_layer": nn.LayerNorm},
    {"norm_layer": nn.BatchNorm1d, "activation_layer": nn.GELU, "dropout": 0.3},
    {"activation_layer": nn.SiLU, "inplace": True, "bias": False, "dropout": 0.1},
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda arguments: ",".join(arguments) or "defaults")
@pytest.mark.parametrize("widths", [[5], [16, 5], [16, 8, 5]], ids=str)
def test_children_keys_initialisation_and_outputs_equal_torchvisions(
    arguments: dict[str, Any], widths: list[int]
) -> None:
    torch.manual_seed(3)
    theirs = torchvision_mlp(7, widths, **arguments)
    torch.manual_seed(3)
    ours = FusedMLP(7, widths, **arguments)
    assert [type(child) for child in ours] == [type(child) for child in theirs]
    assert repr(ours).split("\n")[1:] == repr(theirs).split("\n")[1:]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    x = torch.randn(11, 7)
    for mode in (True, False):
        torch.manual_seed(4)
        expected = theirs.train(mode)(x)
        torch.manual_seed(4)
        assert torch.equal(ours.train(mode)(x), expected)


def test_twenty_steps_of_adam_are_bit_identical_on_the_cpu() -> None:
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 3))
    ours = FusedMLP(20, [32, 16, 3], activation_layer="gelu")
    for (_, target), (_, source) in zip(ours.named_parameters(), theirs.named_parameters()):
        target.data.copy_(source.data)
    optimizers = [torch.optim.Adam(model.parameters(), 1e-2) for model in (ours, theirs)]
    for _ in range(20):
        x, t = torch.randn(64, 20), torch.randint(3, (64,))
        losses = []
        for model, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), t)
            loss.backward()
            optimizer.step()
            losses.append(loss)
        assert torch.equal(*losses)
        for mine, other in zip(ours.parameters(), theirs.parameters()):
            assert torch.equal(mine.grad, other.grad)
            assert torch.equal(mine, other)


def test_the_layers_run_as_kernels(device: str, path: str) -> None:
    model = FusedMLP(20, [32, 16, 3], activation_layer="gelu", dropout=0.0, backend="triton").to(device)
    x = torch.randn(33, 20, device=device)
    with count_launches() as launches:
        y = model(x)
        y.sum().backward()
    assert launches == {
        "layer": {"layer_forward_kernel": 3, "dgrad_kernel": 2, "wgrad_kernel": 3},
        "network": {
            "network_forward_kernel": 1, "network_dgrad_kernel": 1, "network_wgrad_kernel": 1, "sum_partials_kernel": 1,
        },
    }[path]  # fmt: skip
    twin = nn.Sequential(*model)
    torch.testing.assert_close(y, twin(x), rtol=1e-5, atol=1e-5)
    with torch.no_grad(), count_launches() as launches:
        model(x)
    assert launches == {"layer": {"layer_forward_kernel": 3}, "network": {"network_forward_kernel": 1}}[path]


def test_norms_and_dropout_run_as_modules_between_kernels(device: str) -> None:
    model = FusedMLP(20, [32, 16, 3], nn.LayerNorm, nn.GELU, dropout=0.5, backend="triton").to(device)
    model[-1].p = 0.0  # the last Linear's kernel would run this Dropout, with other random numbers
    x = torch.randn(33, 20, device=device)
    for training in (True, False):
        model.train(training)
        torch.manual_seed(5)
        with count_launches() as launches:
            y = model(x)
        assert launches == {"network_forward_kernel": 3}
        torch.manual_seed(5)
        torch.testing.assert_close(y, nn.Sequential(*model)(x), rtol=1e-5, atol=1e-5)


def test_the_next_call_uses_changed_children(device: str, path: str) -> None:
    model = FusedMLP(8, [8, 8], backend="triton").to(device)
    x = torch.randn(5, 8, device=device)

    def assert_agrees(launches: int) -> None:
        with count_launches() as counted:
            y = model(x)
        assert sum(counted.values()) == (launches if path == "layer" else min(launches, 1))
        torch.testing.assert_close(y, nn.Sequential(*model)(x), rtol=1e-5, atol=1e-5)

    assert_agrees(2)
    model.append(nn.Linear(8, 4, device=device))
    assert_agrees(3)
    model.insert(0, nn.Linear(8, 8, device=device))
    assert_agrees(4)
    model[2] = nn.Tanh()
    assert_agrees(4)
    model[2] = nn.LeakyReLU(0.1)
    assert_agrees(4)
    model[2].negative_slope = 0.7
    assert_agrees(4)
    del model[0]
    assert_agrees(3)
    model[0].weight.data.mul_(3)
    assert_agrees(3)
    handle = model[0].register_forward_hook(lambda module, args, output: output + 1)
    assert_agrees(2)
    handle.remove()
    assert_agrees(3)
    parametrizations.weight_norm(model[0])
    assert_agrees(2)
    model[3].forward = lambda input: input * 2
    assert_agrees(1)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    assert_agrees(0)
    handle.remove()


def _shrink(model: FusedMLP) -> None:
    model[0].weight.data = model[0].weight.data[:8]  # a smaller contiguous tensor at the same address
    model[0].bias.data = model[0].bias.data[:8]
    model[3].weight.data = model[3].weight.data[:, :8]


CHANGES = {
    "nothing": lambda model: None,
    "values": lambda model: model[0].weight.data.add_(1),
    "shapes under the same parameters": _shrink,
    "strides": lambda model: setattr(model[3].weight, "data", model[3].weight.data.t().contiguous().t()),
    "another parameter": lambda model: setattr(model[0], "weight", nn.Parameter(torch.randn_like(model[0].weight))),
    "no bias": lambda model: setattr(model[0], "bias", None),
    "frozen": lambda model: model[0].requires_grad_(False),
    "all frozen": lambda model: model.requires_grad_(False),
    "bfloat16": lambda model: model.bfloat16(),
    "recompute": lambda model: setattr(model, "recompute", True),
    "backend": lambda model: setattr(model, "backend", "reference"),
    "load_state_dict": lambda model: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_repeated_call_sees_changes(change: str, device: str) -> None:
    """A cached path is used in the next call only if nothing that it depends on has changed."""
    torch.manual_seed(1)
    model = FusedMLP(20, [16, 4], activation_layer="gelu", backend="triton").to(device)
    x = torch.randn(9, 20, device=device)
    for _ in range(3):
        model(x)
    with torch.no_grad():
        model(x)
    CHANGES[change](model)
    x = x.to(model[0].weight.dtype)
    fresh = copy.deepcopy(model)  # the copy has no cached path
    results = []
    for network in (model, fresh):
        network.zero_grad()
        with count_launches() as launches:
            y = network(x)
            if y.requires_grad:
                y.square().sum().backward()
        with torch.no_grad():
            evaluated = network(x)
        grads = [p.grad for p in network.parameters()]
        results.append((launches, y.detach(), evaluated, grads))
    (launches, y, evaluated, grads), (fresh_launches, fresh_y, fresh_evaluated, fresh_grads) = results
    assert launches == fresh_launches
    assert torch.equal(y, fresh_y)
    assert torch.equal(evaluated, fresh_evaluated)
    for grad, fresh_grad in zip(grads, fresh_grads, strict=True):
        assert (grad is None) == (fresh_grad is None)
        assert grad is None or torch.equal(grad, fresh_grad)


def test_a_repeated_call_sees_the_context(device: str) -> None:
    model = FusedMLP(20, [16, 4], backend="triton").to(device)
    x = torch.randn(9, 20, device=device)
    first = model(x)
    kind = "cuda" if device == "cuda" else "cpu"
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.autocast(kind, dtype):
            assert model(x).dtype == dtype
    assert torch.equal(model(x), first)
    with torch.inference_mode():
        assert model(x).is_inference()
    assert model(x.requires_grad_()).requires_grad
    assert torch.equal(model(x.view(3, 3, 20)).view(9, 4), first)
    assert model(x[:0]).shape == (0, 4)
    for _ in range(2):
        negative = torch.complex(x, x).detach().conj().imag
        assert negative.is_neg()
        assert torch.equal(model(negative), model(-x))
    with pytest.raises(RuntimeError, match="its last dimension needs to be 20"):
        model(x[:, :7])
    doubled = {name: 2 * value for name, value in model.state_dict().items()}
    assert torch.equal(torch.func.functional_call(model, doubled, (x,)), nn.Sequential(*model)(x)) is False
    assert torch.equal(model(x), first)


def test_hooks_in_a_replaced_dict_are_called(device: str) -> None:
    model = FusedMLP(20, [16, 4], backend="triton").to(device)
    x = torch.randn(9, 20, device=device)
    model(x)
    model[0]._forward_hooks = OrderedDict()
    called = []
    model[0].register_forward_hook(lambda module, args, output: called.append(True))
    model(x)
    assert called


def test_a_linear_whose_bias_is_no_parameter_runs_as_a_module(device: str) -> None:
    model = FusedMLP(20, [16, 4], backend="triton").to(device)
    x = torch.randn(9, 20, device=device)
    model(x)
    del model[0].bias
    model[0].bias = torch.ones(16, device=device)
    torch.testing.assert_close(model(x), nn.Sequential(*model)(x))


def test_an_activation_whose_parameter_is_a_buffer(device: str) -> None:
    class Annealed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("negative_slope", torch.tensor(0.1))

        @property
        def activation(self) -> Activation:
            return ACTIVATIONS["leaky_relu"].bind(negative_slope=float(self.negative_slope))

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return nn.functional.leaky_relu(z, float(self.negative_slope))

    model = FusedMLP(20, [16, 4], activation_layer=Annealed, backend="triton").to(device)
    x = torch.randn(9, 20, device=device)
    for slope in (0.1, 0.9, 0.5):
        model[1].negative_slope.fill_(slope)
        torch.testing.assert_close(model(x), nn.Sequential(*model)(x))


@pytest.mark.parametrize("change", [lambda model: model.__setitem__(0, nn.Linear(20, 16)), lambda model: model.pop(0)])
def test_a_replaced_child_is_freed_before_the_next_call(change: Callable[[FusedMLP], object], device: str) -> None:
    model = FusedMLP(20, [16, 4], backend="triton").to(device)
    model(torch.randn(9, 20, device=device)).sum().backward()
    weight = weakref.ref(model[0].weight)
    change(model)
    assert weight() is None


def test_a_model_that_was_called_can_be_copied_and_pickled(device: str) -> None:
    model = FusedMLP(20, [16, 4], backend="triton").to(device)
    x = torch.randn(9, 20, device=device)
    y = model(x)
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)


def test_slices_are_sequential() -> None:
    model = FusedMLP(8, [8, 4])
    assert type(model[0:2]) is nn.Sequential
    assert list(model[0:2].state_dict()) == ["0.weight", "0.bias"]
    assert model[0:2][0] is model[0]
    assert type(model + model) is nn.Sequential


def test_from_sequential_takes_over_the_modules(device: str) -> None:
    names = nn.Sequential()
    names.add_module("flatten", nn.Flatten())
    names.add_module("first", nn.Linear(12, 8))
    names.add_module("act", nn.Softplus(2.0))
    names.add_module("norm", nn.BatchNorm1d(8))
    names.add_module("last", nn.Linear(8, 3))
    names.to(device).eval()
    model = FusedMLP.from_sequential(names, backend="triton")
    assert list(model.state_dict()) == list(names.state_dict())
    assert model.last is names.last
    assert not model.training
    x = torch.randn(6, 3, 4, device=device)
    with count_launches() as launches:
        y = model(x)
    assert launches == {"network_forward_kernel": 2}
    torch.testing.assert_close(y, names(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="sequential is Linear; it needs to be an nn.Sequential"):
        FusedMLP.from_sequential(nn.Linear(2, 2))


def test_one_activation_module_may_be_used_several_times(device: str) -> None:
    shared = nn.Tanh()
    layers = (nn.Linear(6, 5, device=device), nn.Linear(5, 4, device=device), nn.Linear(4, 3, device=device))
    sequential = nn.Sequential(layers[0], shared, layers[1], shared, layers[2])
    model = FusedMLP.from_sequential(sequential, backend="triton")
    assert list(model.state_dict()) == list(sequential.state_dict())
    assert len(model) == len(sequential) == 5
    x = torch.randn(7, 6, device=device)
    torch.testing.assert_close(model(x), sequential(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "gelu", nn.Tanh, nn.LeakyReLU(0.2), "sine"], ids=str)
def test_activation_layer_is_a_name_a_class_an_instance_or_none(activation: Any) -> None:
    model = FusedMLP(4, [5, 6, 2], activation_layer=activation, output_activation="sigmoid")
    kinds = [type(child) for child in model]
    assert kinds[1] is kinds[4] is {"gelu": nn.GELU, "sine": Pointwise, None: nn.Identity}.get(
        activation if isinstance(activation, str | None) else 0, activation if isinstance(activation, type) else type(activation)
    )  # fmt: skip
    assert kinds[-2:] == [nn.Sigmoid, nn.Dropout]
    assert model[1] is not model[4]
    y = model(torch.randn(3, 4))
    assert ((y > 0) & (y < 1)).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_accepted_by_name(name: str) -> None:
    model = FusedMLP(4, [5, 2], activation_layer=name, output_activation=ACTIVATIONS[name])
    assert [find(child) for child in (model[1], model[4])] == [ACTIVATIONS[name]] * 2
    assert model(torch.randn(3, 4)).shape == (3, 2)


def test_a_fused_linear_computes_what_its_linear_and_activation_do(device: str) -> None:
    torch.manual_seed(1)
    plain = nn.Linear(6, 4, device=device)
    torch.manual_seed(1)
    layer = FusedLinear(6, 4, activation="gelu", device=device, backend="triton")
    assert not isinstance(layer, nn.Linear)
    assert type(layer.linear) is nn.Linear
    assert (
        list(layer.state_dict()) == [name for name, _ in layer.named_parameters()] == ["linear.weight", "linear.bias"]
    )
    assert (
        repr(layer)
        == "FusedLinear(\n  activation=gelu\n  (linear): Linear(in_features=6, out_features=4, bias=True)\n)"
    )
    for shape in ((6,), (0, 6), (3, 6), (2, 3, 6)):
        x = torch.randn(*shape, device=device)
        expected = nn.functional.gelu(plain(x))
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
        layer.backend = "reference"
        assert torch.equal(layer(x), expected)
        layer.backend = "triton"
    inside = FusedMLP.from_sequential(nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 2, device=device)), backend="triton")
    x = torch.randn(5, 6, device=device)
    torch.testing.assert_close(inside(x), inside[2](torch.relu(nn.functional.gelu(plain(x)))), rtol=1e-5, atol=1e-5)


MODEL = FusedMLP(4, [6, 3])
GOOD = torch.randn(5, 4)

BAD_CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "numpy": (lambda: MODEL(np.ones((5, 4))), TypeError, "input is ndarray; it needs to be a torch.Tensor"),
    "width": (lambda: MODEL(torch.randn(5, 3)), RuntimeError, r"input has shape \(5, 3\); its last dimension needs to be 4"),
    "scalar": (lambda: MODEL(torch.tensor(1.0)), RuntimeError, r"input has shape \(\)"),
    "integer": (lambda: MODEL(torch.ones(5, 4, dtype=torch.int64)), RuntimeError, r"input is torch.int64.*x.to\(torch.float32\)"),
    "double": (lambda: MODEL(GOOD.double()), RuntimeError, "input is torch.float64, the model's weight 0 torch.float32"),
    "complex": (lambda: MODEL(GOOD.to(torch.complex64)), RuntimeError, "input is torch.complex64"),
    "device": (lambda: MODEL(GOOD.to("meta")), RuntimeError, r"input is on meta, the model's parameters on cpu; move it with x.to\('cpu'\)"),
    "all complex": (lambda: mlp(torch.ones(1, 2, dtype=torch.complex64), [torch.ones(3, 2, dtype=torch.complex64)], None), RuntimeError, "needs to be a real floating-point dtype"),
    "sparse": (lambda: linear_act(GOOD.to_sparse(), torch.randn(3, 4), backend="triton"), RuntimeError, "layout is torch.sparse_coo; the kernels need a dense tensor"),
    "weight": (lambda: linear_act(GOOD, [[1.0]]), TypeError, "weight 0 is list; it needs to be a torch.Tensor"),
    "weight shape": (lambda: linear_act(GOOD, torch.randn(4)), RuntimeError, r"weight 0 has shape \(4,\)"),
    "bias shape": (lambda: linear_act(GOOD, torch.randn(3, 4), torch.randn(4)), RuntimeError, r"bias 0 has shape \(4,\); it needs to be \(3,\)"),
    "layers": (lambda: mlp(GOOD, [torch.randn(6, 4), torch.randn(3, 5)], None), RuntimeError, "layer 1 takes 5 features, layer 0 gives 6"),
    "no layers": (lambda: mlp(GOOD, [], []), ValueError, "weights is empty"),
    "biases": (lambda: mlp(GOOD, [torch.randn(6, 4)], []), ValueError, "biases has 0 entries; it needs one for 1 weight"),
    "activation": (lambda: linear_act(GOOD, torch.randn(3, 4), None, "gelo"), ValueError, "activation is 'gelo'; it needs to be one of"),
    "backend": (lambda: linear_act(GOOD, torch.randn(3, 4), backend="cuda"), ValueError, "backend is 'cuda'; it needs to be one of: auto, triton, reference"),
    "float8 kernels": (lambda: linear_act(GOOD.to(torch.float8_e4m3fn), torch.randn(3, 4).to(torch.float8_e4m3fn), backend="triton"), RuntimeError, "the kernels compute in float16, bfloat16 and float32"),
    "rows": (lambda: MODEL.explain(-1), ValueError, "batch_size is -1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_gives_one_sentence_before_any_launch(name: str) -> None:
    call, kind, sentence = BAD_CALLS[name]
    before = {key: value.clone() for key, value in MODEL.state_dict().items()}
    with count_launches() as launches, pytest.raises(kind, match=sentence) as raised:
        call()
    assert "\n" not in str(raised.value)
    assert not launches
    assert all(torch.equal(value, before[key]) for key, value in MODEL.state_dict().items())


BAD_CONSTRUCTIONS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "empty": (lambda: FusedMLP(4, []), ValueError, "hidden_channels is empty"),
    "int": (lambda: FusedMLP(4, 5), TypeError, "hidden_channels is 5; it needs to be a sequence of widths"),
    "string": (lambda: FusedMLP(4, "512"), TypeError, "hidden_channels is '512'"),
    "negative": (lambda: FusedMLP(4, [3, -1]), ValueError, r"hidden_channels\[1\] is -1; it needs to be 0 or more"),
    "negative input": (lambda: FusedMLP(-4, [3]), ValueError, "in_channels is -4; it needs to be 0 or more"),
    "string width": (lambda: FusedMLP("4", [3]), TypeError, "in_channels is '4'; it needs to be a whole number"),
    "float width": (lambda: FusedMLP(4, [3.0]), TypeError, r"hidden_channels\[0\] is 3.0"),
    "dropout": (lambda: FusedMLP(4, [3], dropout=1.5), ValueError, "dropout is 1.5; it needs to be a probability"),
    "dropout type": (lambda: FusedMLP(4, [3], dropout="a"), TypeError, "dropout is 'a'"),
    "norm": (lambda: FusedMLP(4, [3], norm_layer=3), TypeError, "norm_layer is 3"),
    "activation": (lambda: FusedMLP(4, [3, 2], activation_layer="rellu"), ValueError, "activation_layer is 'rellu'"),
    "activation type": (lambda: FusedMLP(4, [3, 2], activation_layer=3), TypeError, "activation_layer is 3"),
    "output": (lambda: FusedMLP(4, [3, 2], output_activation="soft"), ValueError, "output_activation is 'soft'"),
    "backend": (lambda: FusedMLP(4, [3], backend="gpu"), ValueError, "backend is 'gpu'"),
    "linear": (lambda: FusedLinear(4, -3), ValueError, "out_features is -3"),
    "linear activation": (lambda: FusedLinear(4, 3, activation="x"), ValueError, "activation is 'x'"),
}


@pytest.mark.parametrize("name", BAD_CONSTRUCTIONS)
def test_a_bad_constructor_gives_one_sentence(name: str) -> None:
    call, kind, sentence = BAD_CONSTRUCTIONS[name]
    with pytest.raises(kind, match=sentence) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_mistakes_in_a_call_raise_what_linear_raises() -> None:
    for bad in (
        np.ones((5, 4)),
        torch.randn(5, 3),
        torch.tensor(1.0),
        torch.ones(5, 4, dtype=torch.int64),
        GOOD.double(),
    ):
        with pytest.raises(Exception) as theirs:  # noqa: PT011 (whichever it is)
            nn.Linear(4, 6)(bad)
        with pytest.raises(type(theirs.value)):
            MODEL(bad)


def test_functional_transforms_and_forward_mode_run_plain_torch() -> None:
    model = FusedMLP(4, [6, 3], activation_layer="tanh", backend="auto")
    x = torch.randn(5, 4)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    whole = torch.func.grad(loss)(parameters, x)
    for name in parameters:
        torch.testing.assert_close(per_sample[name].sum(0), whole[name])
    tangent = torch.func.jvp(lambda x: mlp(x, [model[0].weight], None), (x,), (torch.ones_like(x),))[1]
    assert tangent.shape == (5, 6)
    with pytest.raises(RuntimeError, match="a torch.func transform is active"):
        torch.func.vmap(lambda x: mlp(x, [model[0].weight], None, backend="triton"))(x)


def test_torch_compile_and_export_see_torchs_modules_without_kernels(device: str) -> None:
    model = FusedMLP(4, [6, 3], activation_layer="gelu").to(device)
    x = torch.randn(5, 4, device=device)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    compiled(x).sum().backward()
    assert model[0].weight.grad is not None
    layer = FusedLinear(4, 6, activation=nn.LeakyReLU(0.2), device=device)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))
    function = torch.compile(lambda x, w: mlp(x, [w], None, output_activation="tanh"), fullgraph=True, backend="eager")
    torch.testing.assert_close(function(x, layer.weight), mlp(x, [layer.weight], None, output_activation="tanh"))
    exported = torch.export.export(model.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_new_reason_on_a_gpu_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlp_fused.engine import paths

    paths.log_once.cache_clear()

    class OnGpu:
        is_cuda = True

    monkeypatch.setattr(paths, "_why_call_cannot", lambda *_: "the moon is full")
    with caplog.at_level("INFO", "mlp_fused"):
        for _ in range(3):
            assert why_reference(OnGpu(), (), torch.float32, "auto") == "the moon is full"
    assert [record.getMessage() for record in caplog.records] == [
        "plain torch runs instead of the kernels: the moon is full"
    ]


def test_autocast_computes_in_16_bits_and_gives_gradients_in_the_parameters_dtype(device: str) -> None:
    model = FusedMLP(20, [32, 3], activation_layer="gelu", backend="triton").to(device)
    twin = nn.Sequential(*model)
    x = torch.randn(9, 20, device=device)
    with torch.autocast(device, torch.bfloat16):
        y, expected = model(x), twin(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    parameters = list(model.parameters())
    ours = torch.autograd.grad(y.float().square().sum(), parameters)
    theirs = torch.autograd.grad(expected.float().square().sum(), parameters)
    for mine, other in zip(ours, theirs):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, other, rtol=0.05, atol=0.05)


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(0, 4), min_size=0, max_size=3),
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=4),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
    flip=st.booleans(),
)
def test_random_shapes_agree_with_torch(
    shape: list[int], widths: list[int], activation: str, bias: bool, flip: bool
) -> None:
    """The kernels in the interpreter agree with torch for random leading shapes and widths."""
    x = torch.randn(*shape, widths[0]) / 4
    if flip and x.dim() > 1:
        x = x.transpose(0, -2)
    x.requires_grad_()
    weights = [torch.randn(n, k) / k**0.5 for k, n in itertools.pairwise(widths)]
    biases = [torch.randn(n) / 4 for n in widths[1:]] if bias else None
    name = activation if ACTIVATIONS[activation].kinks(*ACTIVATIONS[activation].values) == () else "tanh"
    ours, torchs = (mlp(x, weights, biases, name, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(ours)
    for mine, other in zip(torch.autograd.grad(ours, x, dy), torch.autograd.grad(torchs, x, dy)):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_a_call_with_a_tensor_given_twice_is_not_cached(device: str) -> None:
    """Guards would refuse the next call, so the decision would be made again for each."""
    x, (first, second) = torch.randn(3, 4, device=device), torch.randn(2, 4, 4, device=device)
    bias, other = torch.randn(2, 4, device=device)
    can_hold = Decision.can_hold
    assert can_hold(x, (first, second), (bias, other)) == can_hold(x, (first, second), (bias, None))
    assert can_hold(x, (first, second), (None, None)) == (TensorGuards is not None)
    assert not can_hold(x, (first, first), (bias, other))
    assert not can_hold(x, (first, second), (bias, bias))
