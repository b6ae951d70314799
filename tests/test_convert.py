"""fuse and unfuse: existing models keep their numbers and everything else."""

from __future__ import annotations

import copy
import functools
import importlib
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, Truth, check
from libraries import needs
from models_to_fuse import Deep, sequences
from torch import Tensor, nn

from mlp_fused import fuse, unfuse
from mlp_fused.engine.recognize import CLASSES, find
from mlp_fused.engine.runs import is_linear
from mlp_fused.kernels.activations import ACTIVATIONS
from mlp_fused.kernels.launch import count_launches

# Small versions of the models, with random weights:

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
# With the default, which is meant for wide models, attention's gradients would be rounding errors.
SPREAD = {"initializer_range": 32**-0.5}


def tokens() -> tuple[Tensor, ...]:
    return (torch.randint(50, (2, 7)),)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=16, **SIZES, **SPREAD))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    widths = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 48}
    config = GPT2Config(vocab_size=50, bos_token_id=0, eos_token_id=0, **widths, **SPREAD)
    return GPT2LMHeadModel(config)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **SIZES, **SPREAD))


def timm_vit() -> nn.Module:
    import timm

    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 1.5}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **arguments)


def torchvision_mlp() -> nn.Module:
    from torchvision.ops import MLP

    return MLP(20, [32, 16, 3], activation_layer=nn.GELU)


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(16, 8, 2, 2, 32, 48, num_classes=5)


class Encoder(nn.Module):
    """Both of torch's transformer layers, one with a function and one with a module as activation."""

    def __init__(self, activation: Any = "gelu") -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True, activation=activation)
        self.decoder = nn.TransformerDecoderLayer(32, 2, 48, batch_first=True, activation=nn.SiLU(), norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x, self.encoder(x))


def rows() -> tuple[Tensor, ...]:
    return (torch.randn(9, 20),)


def images() -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, 16, 16),)


@dataclass(frozen=True)
class Model:
    """A model, its inputs, the modules in it that are replaced, and their number of Linear layers."""

    id: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    replaced: tuple[str, ...]
    linears: int
    inner: str  # the name of a Linear in the first replaced module
    library: str = "torch"


MODELS = [
    Model("bert", bert, tokens, ("bert.encoder.layer.0", "bert.encoder.layer.1"), 4,
          "bert.encoder.layer.0.intermediate.dense", "transformers"),
    Model("gpt2", gpt2, tokens, ("transformer.h.0.mlp", "transformer.h.1.mlp"), 4,
          "transformer.h.0.mlp.c_fc", "transformers"),
    Model("vit", vit, images, ("vit.layers.0.mlp", "vit.layers.1.mlp"), 4, "vit.layers.0.mlp.fc2", "transformers"),
    Model("timm_vit", timm_vit, images, ("blocks.0.mlp", "blocks.1.mlp"), 4, "blocks.0.mlp.fc1", "timm"),
    Model("torchvision_mlp", torchvision_mlp, rows, ("",), 3, "3", "torchvision"),
    Model("torchvision_vit", torchvision_vit, images,
          ("encoder.layers.encoder_layer_0.mlp", "encoder.layers.encoder_layer_1.mlp"), 4,
          "encoder.layers.encoder_layer_0.mlp.0", "torchvision"),
    Model("torch_transformer", Encoder, sequences, ("encoder", "decoder"), 4, "encoder.linear1"),
    Model("sequential", Deep, rows, ("body.0", "tail", "tail.3"), 5, "tail.3.3"),
]  # fmt: skip


def models_named(*names: str) -> pytest.MarkDecorator:
    chosen = [model for model in MODELS if model.id in names]
    assert len(chosen) == len(names)
    marks = [() if model.library == "torch" else needs(model.library) for model in chosen]
    return pytest.mark.parametrize(
        "model", [pytest.param(model, id=model.id, marks=mark) for model, mark in zip(chosen, marks)]
    )


every_model = models_named(*(model.id for model in MODELS))


def make_model(model: Model, device: str = "cpu", seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(seed)
    network = model.make().eval()
    for parameter in network.parameters():
        if not parameter.any():  # a head or a bias of zeros would hide errors in the layers before it
            nn.init.normal_(parameter, std=0.1)
    return network.to(device), tuple(tensor.to(device) for tensor in model.inputs())


def logits(network: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    output = network(*inputs)
    return (output if isinstance(output, Tensor) else output.logits).detach()


def forward_backward(
    network: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The logits, and the gradient of every parameter and of the input."""
    inputs = tuple(
        tensor.detach().to(dtype) if tensor.is_floating_point() and dtype else tensor.detach() for tensor in inputs
    )
    inputs = tuple(tensor.requires_grad_(tensor.is_floating_point()) for tensor in inputs)
    network.zero_grad()
    output = network(*inputs)
    y = output if isinstance(output, Tensor) else output.logits
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64, device=y.device).view_as(y).cos()
    (y * weights.to(y.dtype)).sum().backward()
    results = {"y": y.detach()}
    for name, leaf in [*network.named_parameters(), *((f"x{i}", tensor) for i, tensor in enumerate(inputs))]:
        if leaf.grad is not None:
            results[name] = leaf.grad.clone()
    return results


def oracle(network: nn.Module, inputs: tuple[Tensor, ...]) -> Truth:
    """The results in float64, each with the magnitude that its rounding errors scale with.

    For the gradients of a Linear, the magnitudes are |dz|ᵀ|x| and Σ|dz|. The gradient's own value would be too strict
    if its sum cancels: the gradient of attention's key bias is 0. For all other tensors, the magnitude is their
    absolute value.
    """
    magnitudes: dict[str, Tensor] = {}

    def hook(name: str, transposed: bool, x: Tensor) -> Callable[[Tensor], None]:
        def keep(dz: Tensor) -> None:
            dz, rows = dz.detach().abs().flatten(0, -2), x.detach().abs().flatten(0, -2)
            magnitudes[f"{name}.weight"] = rows.t() @ dz if transposed else dz.t() @ rows
            magnitudes[f"{name}.bias"] = dz.sum(0)

        return keep

    network = copy.deepcopy(network).double()
    for name, module in network.named_modules():
        if is_linear(module):
            module.register_forward_hook(
                lambda module, arguments, z, name=name: (
                    z.register_hook(hook(name, not isinstance(module, nn.Linear), arguments[0])) and None
                )
            )
    values = forward_backward(network, inputs, torch.float64)
    return Truth(values, {name: magnitudes.get(name, value.abs()) for name, value in values.items()})


@pytest.mark.parametrize("recompute", [None, True])
@every_model
def test_the_reference_path_is_bit_identical(model: Model, recompute: bool | None) -> None:
    network, inputs = make_model(model)
    before = forward_backward(network, inputs)
    report = fuse(network, backend="reference", recompute=recompute)
    assert tuple(entry.name for entry in report.replaced) == model.replaced
    after = forward_backward(network, inputs)
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize(
    ("path", "dtype"),
    [("network", torch.float32), ("layer", torch.float32), ("layer", torch.bfloat16)],
    indirect=["path"],
    ids=["network-fp32", "layer-fp32", "layer-bf16"],
)
@every_model
def test_logits_and_gradients_on_the_kernels(model: Model, dtype: torch.dtype, path: str, device: str) -> None:
    network, inputs = make_model(model, device)
    network.to(dtype)
    truth = oracle(network, inputs)
    theirs = forward_backward(network, inputs, dtype)
    fuse(network, backend="triton")
    with count_launches() as launches:
        ours = forward_backward(network, inputs, dtype)
    if path == "layer":
        assert launches["layer_forward_kernel"] == model.linears
        assert launches["wgrad_kernel"] == model.linears
    else:
        assert launches["network_forward_kernel"] >= len(model.replaced)
        assert not any(name.startswith("layer") for name in launches)
    check(Case(dtype=dtype), truth, ours, theirs)


@every_model
def test_training_with_active_dropout(model: Model, device: str) -> None:
    network, inputs = make_model(model, device)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    fuse(network, backend="triton")
    without_dropout = logits(network, inputs)
    network.train()
    with count_launches() as launches:
        torch.manual_seed(3)
        first = logits(network, inputs)
        torch.manual_seed(3)
        second = logits(network, inputs)
    assert launches
    assert not torch.equal(first, without_dropout)
    assert torch.equal(first, second)
    assert torch.equal(logits(network.eval(), inputs), without_dropout)


@every_model
def test_fuse_changes_nothing_else_and_unfuse_undoes_it(model: Model) -> None:
    network, _ = make_model(model)
    modules, printed = dict(network.named_modules()), repr(network)
    types = {name: type(module) for name, module in modules.items()}
    attributes = {name: dict(module.__dict__) for name, module in modules.items()}
    state = network.state_dict()
    parameters = dict(network.named_parameters())
    fuse(network)
    assert repr(network) == printed
    assert dict(network.named_modules()) == modules
    assert all(isinstance(module, types[name]) for name, module in modules.items())
    assert all(str(type(module)) == str(types[name]) for name, module in modules.items())
    assert list(network.state_dict()) == list(state)
    for name, parameter in network.named_parameters():
        assert parameter is parameters[name]
    assert unfuse(network) == model.replaced
    assert {name: type(module) for name, module in network.named_modules()} == types
    assert {name: module.__dict__ for name, module in network.named_modules()} == attributes
    assert repr(network) == printed
    assert unfuse(network) == ()


@every_model
def test_state_dicts_load_before_and_after_fuse(model: Model) -> None:
    plain, inputs = make_model(model)
    fused, _ = make_model(model, seed=1)
    fuse(fused)
    fused.load_state_dict(plain.state_dict(), strict=True)
    expected = logits(plain, inputs)
    assert torch.equal(logits(fused, inputs), expected)
    other, _ = make_model(model, seed=2)
    other.load_state_dict(fused.state_dict(), strict=True)
    assert torch.equal(logits(other, inputs), expected)


def saved(network: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network)), saved],
    ids=["deepcopy", "pickle", "save"],
)
@every_model
def test_a_fused_model_can_be_copied_pickled_and_saved(model: Model, copied: Callable[..., nn.Module]) -> None:
    network, inputs = make_model(model)
    fuse(network, backend="triton")
    expected = logits(network, inputs)  # this call also caches kernels
    twin = copied(network)
    assert not {id(parameter) for parameter in twin.parameters()} & {
        id(parameter) for parameter in network.parameters()
    }
    with count_launches() as launches:
        assert torch.equal(logits(twin, inputs), expected)
    assert launches
    assert unfuse(twin) == model.replaced
    assert len(fuse(network).replaced) == 0, "the original is as it was"


@every_model
def test_an_unfused_model_loads_without_the_package(model: Model) -> None:
    network, inputs = make_model(model)
    fuse(network, backend="triton")
    logits(network, inputs)
    assert b"mlp_fused" in pickle.dumps(network)
    unfuse(network)
    assert b"mlp_fused" not in pickle.dumps(network)


@every_model
def test_hooks_on_an_inner_linear_after_fuse_are_honoured(model: Model) -> None:
    network, inputs = make_model(model)
    fuse(network, backend="triton")
    expected = logits(network, inputs)
    linear = network.get_submodule(model.inner)
    seen: list[str] = []
    handles = [
        linear.register_forward_hook(lambda *arguments: seen.append("forward")),
        linear.register_full_backward_hook(lambda *arguments: seen.append("backward")),
    ]
    hooked = forward_backward(network, inputs)["y"]
    assert seen == ["forward", "backward"]
    torch.testing.assert_close(hooked, expected, rtol=1e-4, atol=1e-5)
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(network, inputs), expected)
    assert seen == ["forward", "backward"]


@every_model
def test_fusing_again_changes_nothing(model: Model) -> None:
    network, inputs = make_model(model)
    fuse(network)
    expected = logits(network, inputs)
    report = fuse(network, backend="triton")
    assert report.replaced == ()
    already = [entry.name for entry in report.left if entry.text == "it is fused already"]
    assert tuple(already) == model.replaced
    with count_launches() as launches:
        assert torch.equal(logits(network, inputs), expected)
    assert not launches, "the backend is the first call's"


@models_named("gpt2", "timm_vit", "torchvision_mlp", "torch_transformer", "sequential")
def test_torch_compile_traces_a_fused_model_whole(model: Model) -> None:
    network, inputs = make_model(model)
    expected = logits(network, inputs)
    fuse(network)
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, inputs), expected, rtol=1e-5, atol=1e-6)


@needs("transformers")
def test_gpt2s_transposed_weights_are_not_copied(device: str) -> None:
    network, inputs = make_model(MODELS[1], device)
    fuse(network, backend="triton")
    tied = network.transformer.wte.weight
    forward_backward(network, inputs)
    mlp = network.transformer.h[0].mlp
    (run,) = mlp._segments.runs
    for layer, conv in zip(run.layers(), (mlp.c_fc, mlp.c_proj)):
        assert layer.weight.data_ptr() == conv.weight.data_ptr()
        assert layer.weight.shape == conv.weight.shape[::-1]
        assert layer.weight.stride() == conv.weight.stride()[::-1]
    assert mlp.c_fc.weight.grad.stride() == mlp.c_fc.weight.stride()
    assert network.lm_head.weight is tied is network.transformer.wte.weight


@needs("transformers")
def test_berts_inner_modules_are_called_where_they_are_hooked(device: str) -> None:
    network, inputs = make_model(MODELS[0], device)
    fuse(network, backend="triton")
    expected = logits(network, inputs)
    layer = network.bert.encoder.layer[0]
    seen: list[str] = []
    for name in ("intermediate", "output"):
        layer.get_submodule(name).register_forward_hook(lambda *arguments, name=name: seen.append(name))
    with count_launches() as launches:
        torch.testing.assert_close(logits(network, inputs), expected, rtol=1e-4, atol=1e-5)
    assert seen == ["intermediate", "output"]
    assert launches["network_forward_kernel"] == 1, "the other layer's"


@needs("transformers")
def test_bert_with_chunks_and_hidden_states_is_bit_identical() -> None:
    network, inputs = make_model(MODELS[0])
    for layer in network.bert.encoder.layer:
        layer.chunk_size_feed_forward = 1
    expected = network(*inputs, output_hidden_states=True).hidden_states
    report = fuse(network)  # the hooks that transformers puts on a layer see the same tensors
    assert len(report.replaced) == 2
    for mine, other in zip(network(*inputs, output_hidden_states=True).hidden_states, expected):
        assert torch.equal(mine, other)


@needs("transformers")
def test_every_activation_of_transformers_is_fused_or_reported(device: str) -> None:
    from transformers.activations import ACT2CLS, ACT2FN

    unknown = set()
    z = torch.randn(200, dtype=torch.float64) * 3
    for name in ACT2CLS:
        activation = find(ACT2FN[name])
        if activation is None:
            unknown.add(name)
        else:
            torch.testing.assert_close(activation(z), ACT2FN[name](z), rtol=1e-8, atol=1e-8)
    assert unknown == {"gelu_10", "laplace", "prelu", "sqrtsoftplus", "xielu"}
    network, _ = make_model(MODELS[2])
    for layer in network.vit.layers:
        layer.mlp.activation_fn = ACT2FN["gelu_10"]
    report = fuse(network)
    assert report.replaced == ()
    assert "activation_fn is called as a module: transformers.activations.ClippedGELUActivation has no kernel" in str(
        report
    )


@needs("timm")
@pytest.mark.parametrize("path", [path for path in CLASSES if path.startswith("timm.")])
def test_timms_activations_are_torchs(path: str) -> None:
    module, _, name = path.rpartition(".")
    activation = getattr(importlib.import_module(module), name)()
    z = torch.randn(200, dtype=torch.float64) * 3
    recognized = find(activation)
    assert recognized is ACTIVATIONS[CLASSES[path]]
    torch.testing.assert_close(recognized(z), activation(z.clone()), rtol=1e-8, atol=1e-8)


def test_an_activation_with_a_changed_function_is_not_fused() -> None:
    class GELUActivation(nn.Module):
        act = staticmethod(F.gelu)

        def forward(self, input: Tensor) -> Tensor:
            return self.act(input)

    GELUActivation.__module__, GELUActivation.__qualname__ = "transformers.activations", "GELUActivation"
    module = GELUActivation()
    assert find(module) is ACTIVATIONS["gelu"]
    module.act = torch.tanh
    assert find(module) is None


@needs("timm")
def test_timms_mlp_with_a_norm_has_its_runs_fused(device: str) -> None:
    from timm.layers import Mlp

    mlp = Mlp(16, 24, norm_layer=nn.LayerNorm).to(device)
    x = torch.randn(5, 16, device=device)
    expected = mlp(x)
    report = fuse(mlp, backend="triton")
    assert "fc1 + gelu; norm is called as a module: normalization.LayerNorm has no kernel" in str(report)
    with count_launches() as launches:
        torch.testing.assert_close(mlp(x=x), expected, rtol=1e-5, atol=1e-5)
    assert launches == {"network_forward_kernel": 2}


@needs("timm")
@pytest.mark.parametrize("name", ["GluMlp", "SwiGLU"])
def test_timms_gated_mlps_are_not_fused_and_are_named(name: str) -> None:
    import timm.layers

    model = nn.ModuleDict({"mlp": getattr(timm.layers, name)(16, 32)})
    report = fuse(model)
    assert report.replaced == ()
    assert f"mlp ({name}): it is gated" in str(report)


@needs("timm")
def test_timms_mlp_of_convolutions_is_not_fused_and_is_named() -> None:
    from timm.layers import Mlp

    report = fuse(Mlp(16, 24, use_conv=True))
    assert "the model itself (Mlp): no Linear in it is followed by an activation" in str(report)
    assert "fc1 is called as a module: conv.Conv2d has no kernel" in str(report)


def test_vits_intermediate_of_older_transformers(device: str) -> None:
    class ViTIntermediate(nn.Module):
        """A stand-in with the attributes of the older class."""

        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(16, 24)
            self.intermediate_act_fn = nn.GELU()

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.intermediate_act_fn(self.dense(hidden_states))

    ViTIntermediate.__module__, ViTIntermediate.__qualname__ = "transformers.models.vit.modeling_vit", "ViTIntermediate"
    module, x = ViTIntermediate().to(device), torch.randn(3, 16, device=device)
    expected = module(x)
    assert len(fuse(module, backend="triton").replaced) == 1
    with count_launches() as launches:
        torch.testing.assert_close(module(hidden_states=x), expected, rtol=1e-5, atol=1e-5)
    assert launches == {"network_forward_kernel": 1}


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        ("relu", "relu"),
        (nn.Mish(), "mish"),
        (functools.partial(F.gelu, approximate="tanh"), "gelu_tanh"),
        (torch.tanh, "tanh"),
    ],
    ids=["relu", "Mish", "gelu_tanh", "tanh"],
)
def test_a_transformer_layers_activation_may_be_a_function(activation: Any, name: str, device: str) -> None:
    layer, x = Encoder(activation).to(device), sequences()[0].to(device)
    layer.eval()
    expected = layer(x)
    assert f"linear1 + {name}, linear2" in str(fuse(layer, backend="triton"))
    with count_launches() as launches:
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert launches == {"network_forward_kernel": 2}
    del layer.encoder.activation
    layer.encoder.activation = torch.sin  # the next call uses the new function
    changed = layer(x)
    unfuse(layer)
    torch.testing.assert_close(layer(x), changed, rtol=1e-4, atol=1e-5)


def test_an_unknown_function_is_named() -> None:
    def wave(z: Tensor) -> Tensor:
        return torch.sin(3 * z)

    report = fuse(Encoder(wave))
    assert [entry.name for entry in report.replaced] == ["decoder"]
    assert "activation is called as a module: wave has no kernel" in str(report)


def test_the_encoders_inference_operator_stays_torchs(device: str) -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 48, batch_first=True).to(device).eval()
    x = sequences()[0].to(device)
    with torch.no_grad():
        expected = layer(x)
        assert "torch.backends.mha.set_fastpath_enabled(False)" in str(fuse(layer, backend="triton"))
        with count_launches() as launches:
            assert torch.equal(layer(x), expected)
        assert launches == {}
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with count_launches() as launches:
                torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        assert launches == {"network_forward_kernel": 1}
