"""FusedLinear beside its plain twin, nn.Linear followed by the activation: the same tools applied to both.

`backend="auto"` is plain torch on a CPU; with "triton" the kernels run, in the interpreter or on a GPU.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.utils import parametrizations, parametrize, prune

from mlp_fused import ACTIVATIONS, FusedLinear, FusedMLP, fuse
from mlp_fused.kernels.launch import count_launches

BACKENDS = pytest.mark.parametrize("backend", ["auto", "triton"])
OLD = Path(__file__).parent / "data" / "saved" / "fused_linear_6f8e961.pt"


def model(backend: str, device: str, fused: bool = True) -> nn.Sequential:
    """An nn.Sequential of three layers, two of them with an activation. With `fused`, `fuse` was called on it."""
    layers = [FusedLinear(16, 32, activation="relu", backend=backend), nn.Linear(32, 16)]
    model = nn.Sequential(*layers, FusedLinear(16, 4, activation="tanh", backend=backend)).to(device)
    if fused:
        fuse(model, backend=backend)
    return model


def twin(device: str) -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 4), nn.Tanh()).to(device)


def pair(backend: str, device: str, fused: bool = True) -> tuple[nn.Sequential, nn.Sequential]:
    """The model and its twin, with equal parameters."""
    ours, theirs = model(backend, device, fused), twin(device)
    for target, source in zip(theirs.parameters(), ours.parameters(), strict=True):
        target.data.copy_(source.data)
    return ours, theirs


def linears(network: nn.Module) -> list[nn.Linear]:
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


def rows(device: str) -> Tensor:
    return torch.randn(5, 16, device=device)


def agree(ours: nn.Module, theirs: nn.Module, x: Tensor, kernels: bool | None = None) -> None:
    """Assert that outputs and gradients are equal, and that kernels ran (True), none ran (False), or either (None)."""
    results = []
    for network in (ours, theirs):
        for parameter in network.parameters():
            parameter.grad = None
        inputs = x.detach().clone().requires_grad_()
        with count_launches() as launches:
            y = network(inputs)
            y.square().sum().backward()
        results.append([y, inputs.grad, *(parameter.grad for parameter in network.parameters())])
        assert network is theirs or kernels is None or bool(launches) == kernels
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@BACKENDS
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
def test_the_layers_compute_what_the_twin_does(fused: bool, backend: str, device: str) -> None:
    ours, theirs = pair(backend, device, fused)
    for _ in range(2):
        agree(ours, theirs, rows(device), kernels=backend == "triton" or device == "cuda")


def test_the_layers_run_in_one_kernel_with_their_neighbours(device: str) -> None:
    network = model("triton", device)
    with torch.no_grad(), count_launches() as launches:
        network(rows(device))
    assert launches == {"network_forward_kernel": 1}
    assert [run.children for run in network.explain(5, device="NVIDIA H200").runs] == [
        "0 FusedLinear, 1 Linear, 2 FusedLinear"
    ]
    report = str(fuse(nn.ModuleList([model("auto", device, fused=False), FusedLinear(2, 2)])))
    assert "0 (Sequential): 0 + relu, 1, 2 + tanh" in report
    assert "0.0, 0.2, 1 (FusedLinear): it is fused already" in report
    assert "linear (Linear)" not in report


def test_shared_weights_are_not_fused_and_are_named() -> None:
    first, second = (nn.Sequential(FusedLinear(8, 8, activation="relu"), nn.Linear(8, 8)) for _ in range(2))
    second[0].weight = first[0].weight
    report = fuse(nn.ModuleList([first, second]))
    assert report.replaced == ()
    assert "its 0.linear.weight is shared with 1.0.linear.weight" in str(report)


def test_the_layer_explains_and_warms_up_itself(device: str) -> None:
    layer = FusedLinear(16, 32, activation="gelu", backend="triton", device=device)
    plan = layer.explain(5, device="NVIDIA H200")
    assert [run.children for run in plan.runs] == ["linear Linear, activation gelu"]
    assert (
        plan.saved_bytes
        == FusedMLP.from_sequential(nn.Sequential(nn.Linear(16, 32), nn.GELU()))
        .explain(5, device="NVIDIA H200")
        .saved_bytes
    )
    assert layer.warmup(5) > 0
    layer.linear.register_forward_hook(lambda *_: None)
    assert "linear Linear: reference, because it has hooks" in str(layer.explain(5))
    assert "0 FusedLinear: reference, because it has hooks" in str(
        FusedMLP.from_sequential(nn.Sequential(layer)).explain(5)
    )


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("prefix", ["", "0.", "body.0."])
def test_keys_of_a_plain_linear_load(prefix: str, assign: bool, device: str) -> None:
    plain, layer = nn.Linear(16, 32, device=device), FusedLinear(16, 32, activation="relu", device=device)
    wrap: dict[str, Callable[[nn.Module], nn.Module]] = {
        "": lambda module: module,
        "0.": lambda module: nn.Sequential(module, nn.Linear(32, 2, device=device)),
        "body.0.": lambda module: nn.ModuleDict(
            {"body": nn.Sequential(module), "head": nn.LayerNorm(3, device=device)}
        ),
    }
    theirs, ours = wrap[prefix](plain), wrap[prefix](layer)
    state = theirs.state_dict()
    keys = list(state)
    assert ours.load_state_dict(state, strict=True, assign=assign) == ([], [])
    assert list(state) == keys, "the caller's dict is as it was"
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.bias, plain.bias)
    assert (layer.weight.data_ptr() == plain.weight.data_ptr()) == assign
    assert isinstance(layer.linear.weight, nn.Parameter)
    own = ours.state_dict()
    assert [key for key in own if key.startswith(prefix)][:2] == [f"{prefix}linear.weight", f"{prefix}linear.bias"]
    assert ours.load_state_dict(own) == ([], [])


def test_keys_that_do_not_fit_raise_torchs_errors() -> None:
    layer = FusedLinear(3, 2)
    own, plain = layer.state_dict(), nn.Linear(3, 2).state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "weight", "bias"\. *$'):
        layer.load_state_dict({**own, **plain})
    assert layer.load_state_dict({**own, **plain}, strict=False) == ([], ["weight", "bias"])
    assert torch.equal(layer.weight, own["linear.weight"])
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "linear.bias"'):
        layer.load_state_dict({"weight": plain["weight"]})
    with pytest.raises(RuntimeError, match=r"size mismatch for linear.weight"):
        layer.load_state_dict(nn.Linear(4, 2).state_dict())
    without = FusedLinear(3, 2, bias=False)
    assert without.load_state_dict(nn.Linear(3, 2, bias=False).state_dict()) == ([], [])
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "linear.bias"'):
        without.load_state_dict(plain)


@BACKENDS
def test_a_pickle_of_the_layer_as_an_nn_linear_loads(backend: str, device: str) -> None:
    """The file was written at 6f8e961, where FusedLinear was derived from nn.Linear."""
    saved = torch.load(OLD, weights_only=False, map_location=device)
    network, x, y = saved["model"], saved["x"], saved["y"]
    first, second = network
    for layer in (first, second):
        layer.backend = backend
        assert type(layer) is FusedLinear
        assert type(layer.linear) is nn.Linear
    assert first.activation is ACTIVATIONS["leaky_relu"].bind(negative_slope=0.3)
    assert [parameter.requires_grad for _, parameter in first.named_parameters()] == [True, False]
    assert (first.in_features, first.out_features, second.bias) == (3, 4, None)
    assert [module.training for module in (first, first.linear, second, second.linear)] == [True, True, False, False]
    assert list(network.state_dict()) == ["0.linear.weight", "0.linear.bias", "1.linear.weight"]
    for copied in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        torch.testing.assert_close(copied(x), y, rtol=1e-5, atol=1e-6)
    fresh = nn.Sequential(FusedLinear(3, 4, activation=first.activation), FusedLinear(4, 2, False, "gelu")).to(device)
    assert fresh.load_state_dict(saved["state_dict"]) == ([], [])
    torch.testing.assert_close(fresh(x), y, rtol=1e-5, atol=1e-6)


@BACKENDS
def test_attributes_of_nn_linear_are_those_of_the_child(backend: str, device: str) -> None:
    layer, x = FusedLinear(6, 4, activation="relu", backend=backend, device=device), torch.randn(3, 6, device=device)
    assert (layer.in_features, layer.out_features) == (6, 4)
    assert layer.weight is layer.linear.weight
    assert layer.bias is layer.linear.bias

    def assert_agrees() -> None:
        torch.testing.assert_close(layer(x), torch.relu(layer.linear(x)), rtol=1e-5, atol=1e-5)

    assert_agrees()
    weight = nn.Parameter(torch.randn(4, 6, device=device))
    layer.weight = weight
    assert layer.linear.weight is weight
    assert_agrees()
    with torch.no_grad():
        layer.weight += 1
        layer.bias *= 2
    assert layer.linear.weight is weight
    assert_agrees()
    assert {name for name, _ in layer.named_parameters()} == {"linear.weight", "linear.bias"}
    with pytest.raises(TypeError, match="cannot assign 'torch.FloatTensor' as parameter 'weight'"):
        layer.weight = torch.randn(4, 6)
    layer.bias = None
    assert layer.linear.bias is None
    assert_agrees()
    before = layer.weight.clone()
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    plain = nn.Linear(6, 4, device=device)
    assert torch.equal(layer.weight, plain.weight)
    assert not torch.equal(layer.weight, before)
    layer.out_features = 4
    assert "out_features" not in vars(layer)
    del layer.bias
    assert not hasattr(layer.linear, "bias")


def test_the_constructor_takes_nn_linears_arguments() -> None:
    layer = FusedLinear(6, 4, bias=False, activation=nn.SiLU, device="meta", dtype=torch.bfloat16)
    assert (layer.weight.device.type, layer.weight.dtype, layer.bias) == ("meta", torch.bfloat16, None)
    assert nn.utils.skip_init(FusedLinear, 6, 4).weight.shape == (4, 6)
    assert layer.to_empty(device="cpu")(torch.randn(2, 6, dtype=torch.bfloat16)).shape == (2, 4)


def initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        nn.init.constant_(module.bias, 0.1)


@BACKENDS
def test_initialisers_reach_every_linear(backend: str, device: str) -> None:
    ours, theirs = pair(backend, device)
    agree(ours, theirs, rows(device))
    for network in (ours, theirs):
        torch.manual_seed(4)
        network.apply(initialise)
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(mine, other)
    agree(ours, theirs, rows(device), kernels=backend == "triton" or device == "cuda")


def groups(network: nn.Module) -> list[dict[str, Any]]:
    decayed = [module.weight for module in network.modules() if isinstance(module, nn.Linear)]
    ids = set(map(id, decayed))
    rest = [parameter for parameter in network.parameters() if id(parameter) not in ids]
    return [{"params": decayed, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0}]


def learn(network: nn.Module, optimizer: torch.optim.Optimizer, device: str, steps: int = 2) -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        x, t = (torch.randn(6, width, generator=generator).to(device) for width in (16, 4))
        optimizer.zero_grad()
        (network(x) - t).square().mean().backward()
        optimizer.step()


@BACKENDS
def test_parameter_groups_contain_every_linear(backend: str, device: str) -> None:
    ours, theirs = pair(backend, device)
    for network in (ours, theirs):
        learn(network, torch.optim.SGD(groups(network), lr=0.1), device)
    agree(ours, theirs, rows(device))


class Lora(nn.Module):
    """An adapter that replaces an nn.Linear, y = base(x) + up(down(x))."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(6)
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=generator).to(base.weight.device))
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=generator).to(base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.t() @ self.up.t()

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        self.base.weight += self.up @ self.down
        return self.base


def swap(network: nn.Module, kind: type, make: Callable[[Any], nn.Module]) -> None:
    """Replace every module of a class, like quantisers and adapters do."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, kind):
                setattr(module, name, make(child))


@BACKENDS
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
def test_an_adapter_replaces_every_linear_merged_and_unmerged(fused: bool, backend: str, device: str) -> None:
    ours, theirs = pair(backend, device, fused)
    x, on_kernels = rows(device), backend == "triton" or device == "cuda"
    agree(ours, theirs, x, on_kernels)
    for network in (ours, theirs):
        swap(network, nn.Linear, Lora)
    for _ in range(2):
        agree(ours, theirs, x, kernels=False)
    unmerged = ours(x)
    for network in (ours, theirs):
        swap(network, Lora, Lora.merged)
    for _ in range(2):
        agree(ours, theirs, x, on_kernels)
    torch.testing.assert_close(ours(x), unmerged, rtol=1e-4, atol=1e-5)


def test_dynamic_quantisation_keeps_the_activation() -> None:
    ours, theirs = pair("auto", "cpu")
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch has no engine for quantised products")
    quantised = [torch.ao.quantization.quantize_dynamic(network, {nn.Linear}) for network in (ours, theirs)]
    assert not linears(quantised[0])
    x = rows("cpu")
    assert torch.equal(quantised[0](x), quantised[1](x))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


TRANSFORMS: dict[str, Callable[[nn.Linear], Any]] = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "parametrize": lambda linear: parametrize.register_parametrization(linear, "weight", Doubled()),
    "parametrized bias": lambda linear: parametrize.register_parametrization(linear, "bias", Doubled()),
    "prune": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
}


@BACKENDS
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_computed_weights_run_as_modules(transform: str, fused: bool, backend: str, device: str) -> None:
    ours, theirs = pair(backend, device, fused)
    ours.eval()
    theirs.eval()
    agree(ours, theirs, rows(device))
    for network in (ours, theirs):
        for linear in linears(network):
            torch.manual_seed(7)
            TRANSFORMS[transform](linear)
    for _ in range(2):
        agree(ours, theirs, rows(device), kernels=False)


@pytest.mark.parametrize(
    "transform",
    [parametrizations.weight_norm, lambda layer: parametrize.register_parametrization(layer, "weight", Doubled())],
)
def test_a_weight_is_parametrized_on_the_child(transform: Callable[..., Any]) -> None:
    layer = FusedLinear(3, 2)
    with pytest.raises(
        ValueError, match="does not have a parameter, a buffer, or a parametrized element with name 'weight'"
    ):
        transform(layer)
    assert type(layer) is FusedLinear
    assert layer(torch.randn(4, 3)).shape == (4, 2)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda module: module.register_forward_hook(lambda module, inputs, output: 2 * output),
    "forward pre": lambda module: module.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],)),
    "forward with kwargs": lambda module: module.register_forward_hook(
        lambda module, inputs, keywords, output: 2 * output, with_kwargs=True
    ),
    "backward": lambda module: module.register_full_backward_hook(
        lambda module, grad_input, grad_output: tuple(None if grad is None else 2 * grad for grad in grad_input)
    ),
    "backward pre": lambda module: module.register_full_backward_pre_hook(
        lambda module, grad_output: tuple(2 * grad for grad in grad_output)
    ),
}


@BACKENDS
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_the_child_run_between_it_and_the_activation(
    hook: str, fused: bool, backend: str, device: str
) -> None:
    ours, theirs = pair(backend, device, fused)
    x, on_kernels = rows(device), backend == "triton" or device == "cuda"
    agree(ours, theirs, x, on_kernels)
    handles = [HOOKS[hook](linear) for network in (ours, theirs) for linear in linears(network)]
    for _ in range(2):
        agree(ours, theirs, x, kernels=False)
    for handle in handles:
        handle.remove()
    agree(ours, theirs, x, on_kernels)


@BACKENDS
def test_hooks_on_the_layer_run_after_the_activation(backend: str, device: str) -> None:
    ours, theirs = pair(backend, device)
    agree(ours, theirs, rows(device))
    HOOKS["forward"](ours[0])
    HOOKS["forward"](theirs[1])
    for _ in range(2):
        agree(ours, theirs, rows(device), kernels=backend == "triton" or device == "cuda")


def test_an_assigned_activation_is_checked() -> None:
    layer = FusedLinear(4, 3, activation="relu")
    with pytest.raises(ValueError, match="^activation is 'rellu'; it needs to be one of: identity, relu"):
        layer.activation = "rellu"
    assert layer.activation is ACTIVATIONS["relu"]


CHANGES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "another linear": (
        lambda ours: setattr(ours[0], "linear", like(ours[0].linear)),
        lambda theirs: theirs.__setitem__(0, like(theirs[0])),
    ),
    "another activation": (
        lambda ours: setattr(ours[0], "activation", ACTIVATIONS["silu"]),
        lambda theirs: theirs.__setitem__(1, nn.SiLU()),
    ),
    "an activation's name": (
        lambda ours: setattr(ours[0], "activation", "silu"),
        lambda theirs: theirs.__setitem__(1, nn.SiLU()),
    ),
    "no activation": (
        lambda ours: setattr(ours[0], "activation", None),
        lambda theirs: theirs.__setitem__(1, nn.Identity()),
    ),
    "a patched forward": (
        lambda ours: setattr(ours[0].linear, "forward", lambda x: x.repeat(1, 2)),
        lambda theirs: setattr(theirs[0], "forward", lambda x: x.repeat(1, 2)),
    ),
    "another module": (
        lambda ours: setattr(ours[0], "linear", nn.Sequential(like(ours[0].linear), nn.Softmax(-1))),
        lambda theirs: theirs.__setitem__(0, nn.Sequential(like(theirs[0]), nn.Softmax(-1))),
    ),
    "no bias": (lambda ours: setattr(ours[0], "bias", None), lambda theirs: setattr(theirs[0], "bias", None)),
}


def like(linear: nn.Linear) -> nn.Linear:
    """Another nn.Linear of the same shape, with the same values in every call."""
    other = copy.deepcopy(linear)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    return other


@BACKENDS
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_repeated_call_sees_a_change_of_the_layer(change: str, fused: bool, backend: str, device: str) -> None:
    ours, theirs = pair(backend, device, fused)
    x = rows(device)
    for _ in range(2):
        agree(ours, theirs, x)
    before = ours(x)
    for network, do in zip((ours, theirs), CHANGES[change]):
        do(network)
    for _ in range(2):
        agree(ours, theirs, x)
    assert not torch.allclose(ours(x), before)


@BACKENDS
def test_functional_calls_address_the_child(backend: str, device: str) -> None:
    ours, theirs = pair(backend, device)
    x = rows(device)
    doubled = [
        {name: (2 * value).requires_grad_() for name, value in network.state_dict().items()}
        for network in (ours, theirs)
    ]
    assert list(doubled[0])[:2] == ["0.linear.weight", "0.linear.bias"]
    results = []
    for network, state in zip((ours, theirs), doubled):
        y = torch.func.functional_call(network, state, (x,))
        results.append([y, *torch.autograd.grad(y.square().sum(), list(state.values()))])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    agree(ours, theirs, x)


@BACKENDS
def test_distributed_checkpoints_with_an_optimizer(backend: str, device: str, tmp_path: Path) -> None:
    """Save after two steps, load into another model and optimizer, and train on. The result is that of the twin."""
    ours, theirs = pair(backend, device)
    optimizers = [torch.optim.AdamW(groups(network), lr=0.01) for network in (ours, theirs)]
    for network, optimizer in zip((ours, theirs), optimizers):
        learn(network, optimizer, device)
    state, optimizer_state = get_state_dict(ours, optimizers[0])
    assert set(state) == {name for name, _ in ours.named_parameters()}
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=tmp_path)

    torch.manual_seed(8)
    other = model(backend, device)
    other_optimizer = torch.optim.AdamW(groups(other), lr=0.1)
    state, optimizer_state = get_state_dict(other, other_optimizer)
    loaded = {"model": state, "optimizer": optimizer_state}
    dcp.load(loaded, checkpoint_id=tmp_path)
    assert set_state_dict(
        other, other_optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
    ) == ([], [])
    agree(other, theirs, rows(device))
    learn(other, other_optimizer, device)
    learn(theirs, optimizers[1], device)
    agree(other, theirs, rows(device))


@BACKENDS
def test_compiled_and_exported(backend: str, device: str) -> None:
    ours, theirs = pair(backend, device)
    x = rows(device)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        agree(compiled, theirs, x)
    exported = torch.export.export(ours.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), theirs(x), rtol=1e-4, atol=1e-5)
