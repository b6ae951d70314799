"""Tools that read a model's code: torch.fx, torch.jit.script, torch.onnx, decompositions, quantisers of graphs.

They trace plain torch, so the results equal those of the plain twin.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.fx
from libraries import load
from torch import nn
from torch.export.experimental import _export_forward_backward
from twins import BACKENDS, KINDS, fused_and_twin

from mlp_fused import FusedLinear, FusedMLP, decompositions, fuse, unfuse
from mlp_fused.kernels.activations import ACTIVATIONS

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit.script and FX quantisation


def targets(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op in ("call_function", "call_module")]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """The plain path on a CPU, and the kernels."""
    return request.param


@pytest.fixture
def vision() -> Any:
    return load("torchvision.models")


@pytest.mark.parametrize("kind", ["mlp", "fused"])
def test_fx_sees_the_children(kind: str, backend: str) -> None:
    model, twin = fused_and_twin(kind, backend)
    for outer in (nn.Sequential, lambda module: module):
        traced, plain = torch.fx.symbolic_trace(outer(model)), torch.fx.symbolic_trace(outer(twin))
        assert targets(traced.graph) == targets(plain.graph)
        assert torch.equal(traced(X), twin(X))


def test_fx_sees_a_fused_linears_linear_and_activation(backend: str) -> None:
    model, twin = fused_and_twin("linear", backend)
    traced = torch.fx.symbolic_trace(model)
    assert [target.split(" ")[0] for target in targets(traced.graph)] == ["0.linear", "<function", "1"]
    assert torch.equal(traced(X), twin(X))


def test_torchvision_extracts_features_after_fuse(vision: Any, backend: str) -> None:
    extraction = load("torchvision.models.feature_extraction")
    model = vision.VisionTransformer(
        image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3
    ).eval()
    twin = copy.deepcopy(model)
    assert fuse(model, backend=backend).replaced
    names = extraction.get_graph_node_names(twin)
    assert extraction.get_graph_node_names(model) == names
    (feature,) = [name for name in names[0] if name.endswith(".mlp")]  # torchvision's MLP is traced as one node
    x = torch.randn(2, 3, 8, 8)
    ours, theirs = (extraction.create_feature_extractor(module, [feature])(x)[feature] for module in (model, twin))
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_fx_graph_mode_quantisation(kind: str, backend: str) -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    outputs = []
    for model in fused_and_twin(kind, backend):
        prepared = prepare_fx(model.eval(), get_default_qconfig_mapping("x86"), (X,))
        prepared(X)
        converted = convert_fx(prepared)
        assert any(path.endswith("quantized.modules.linear.Linear") for path in map(class_path, converted.modules()))
        outputs.append(converted(X))
    assert torch.equal(*outputs)


def class_path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}".replace("intrinsic.", "").replace(
        "linear_relu.LinearReLU", "linear.Linear"
    )


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", KINDS)
def test_jit_script(kind: str, backend: str, training: bool) -> None:
    model, twin = fused_and_twin(kind, backend)
    model.train(training)
    scripted = torch.jit.script(model)
    assert scripted.training == training
    assert list(scripted.state_dict()) == list(twin.state_dict())
    assert torch.equal(scripted(X), twin(X))
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    assert torch.equal(torch.jit.load(buffer)(X), twin(X))


@pytest.mark.parametrize("kind", ["mlp", "fused"])
def test_jit_script_leaves_the_model_fused(kind: str) -> None:
    model, _ = fused_and_twin(kind)
    before = type(model)
    torch.jit.script(model)
    torch.jit.script(copy.deepcopy(nn.Sequential(model)))
    assert type(model) is before
    assert unfuse(model) == (("",) if kind == "fused" else ())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_jit_script_of_every_activation(activation: str) -> None:
    layer = FusedLinear(4, 3, activation=activation)
    assert torch.equal(torch.jit.script(layer)(X), layer(X))


def test_jit_script_of_a_fused_transformer_layer() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True).eval()
    twin = copy.deepcopy(model)
    assert fuse(model).replaced
    x = torch.randn(2, 3, 8)
    assert torch.equal(torch.jit.script(model)(x), torch.jit.script(twin)(x))


def test_jit_script_keeps_dropout_and_norms() -> None:
    model = FusedMLP(4, [8, 3], norm_layer=nn.LayerNorm, dropout=0.5)
    twin = nn.Sequential(*copy.deepcopy(list(model)))
    scripted = torch.jit.script(model)
    torch.manual_seed(0)
    ours = scripted(X)
    torch.manual_seed(0)
    assert torch.equal(ours, twin(X))


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    rows = torch.export.Dim("rows", min=2)
    return torch.export.export(model, (X,), dynamic_shapes=({0: rows},))


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_operator_decomposes_to_aten(kind: str, trainable: bool) -> None:
    model, twin = fused_and_twin(kind, "triton", "gelu")
    program = exported(model.requires_grad_(trainable))
    assert any("mlp_fused" in target for target in targets(program.graph))
    core = torch.export.default_decompositions()
    core.update(decompositions())
    linears = ["aten.linear.default", "aten.gelu.default", "aten.linear.default"]
    for table, expected in ((decompositions(), linears), (core, None)):
        decomposed = program.run_decompositions(table)
        assert all(target.startswith("aten.") for target in targets(decomposed.graph))
        assert expected is None or targets(decomposed.graph) == expected
        for rows in (5, 9):
            x = torch.randn(rows, 4)
            assert torch.allclose(decomposed.module()(x), twin(x), atol=1e-6)
        buffer = io.BytesIO()
        torch.export.save(decomposed, buffer)
        buffer.seek(0)
        assert torch.equal(torch.export.load(buffer).module()(X), decomposed.module()(X))


def test_a_program_with_a_backward_is_not_decomposed() -> None:
    """Its backward would read saved tensors that are never written."""

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = FusedMLP(4, [8, 3], backend="triton")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x).square().mean()

    program = _export_forward_backward(torch.export.export(Loss(), (X,)))
    assert any("mlp_backward" in target for target in targets(program.graph))
    with pytest.raises(RuntimeError, match=r"the program has a backward of mlp_fused; decompositions\(\) needs"):
        program.run_decompositions(decompositions())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_decomposed_program_computes_in_the_operators_dtype(dtype: torch.dtype) -> None:
    model, twin = fused_and_twin("mlp", "triton")
    with torch.autocast("cpu", dtype):
        program = exported(model)
        expected = twin(X)
    y = program.run_decompositions(decompositions()).module()(X)
    assert y.dtype == dtype
    assert torch.allclose(y, expected, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_export_quantisers_find_the_linears(kind: str, backend: str) -> None:
    pt2e = load("torchao.quantization.pt2e.quantize_pt2e")
    x86 = load("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    results = []
    for model in fused_and_twin(kind, backend):
        program = torch.export.export(model.requires_grad_(False).eval(), (X,)).run_decompositions(decompositions())
        quantiser = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = pt2e.prepare_pt2e(program.module(), quantiser)
        prepared(X)
        converted = pt2e.convert_pt2e(prepared)
        results.append((converted(X), sum("quantize_per" in target for target in targets(converted.graph))))
    (ours, our_nodes), (theirs, their_nodes) = results
    assert our_nodes == their_nodes > 0
    assert torch.equal(ours, theirs)


@pytest.fixture
def onnx() -> Iterator[Any]:
    for library in ("onnx", "onnxscript", "onnxruntime"):
        load(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield torch.onnx


@pytest.mark.parametrize(
    ("kind", "activation"), [*((kind, "gelu") for kind in KINDS), ("mlp", "relu"), ("mlp", "silu"), ("mlp", "tanh")]
)
def test_onnx_export(onnx: Any, kind: str, activation: str) -> None:
    model, twin = fused_and_twin(kind, "auto", activation)
    program = onnx.export(model.eval(), (X,), dynamo=True, verbose=False)
    assert torch.allclose(program(X)[0], twin(X), atol=1e-5)


def test_onnx_export_with_recompute(onnx: Any) -> None:
    """With recompute, the CPU takes the code path of a GPU."""
    model, twin = fused_and_twin("mlp")
    model.recompute = True
    assert torch.allclose(onnx.export(model, (X,), dynamo=True, verbose=False)(X)[0], twin(X), atol=1e-5)


def test_onnx_export_of_a_decomposed_program(onnx: Any) -> None:
    model, twin = fused_and_twin("mlp", "triton")
    program = exported(model).run_decompositions(decompositions())
    assert torch.allclose(onnx.export(program, (X,), dynamo=True, verbose=False)(X)[0], twin(X), atol=1e-5)


def test_onnx_export_of_the_kernels_is_refused(onnx: Any) -> None:
    model, _ = fused_and_twin("mlp", "triton")
    with pytest.raises(Exception, match='backend is "triton", but the call is being exported to ONNX; backend="auto"'):
        onnx.export(model, (X,), dynamo=True, verbose=False)


@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "Module.compile"])
@pytest.mark.parametrize("kind", KINDS)
def test_compile_of_a_model_around_a_fused_one(kind: str, backend: str, in_place: bool) -> None:
    torch._dynamo.reset()
    inner, twin = fused_and_twin(kind, backend)
    model, twin = nn.Sequential(inner, nn.LayerNorm(3), nn.Linear(3, 2)), nn.Sequential(twin, nn.LayerNorm(3))
    twin.append(copy.deepcopy(model[2]))
    compiled: Any = model
    if in_place:
        model.compile(fullgraph=True)
    else:
        compiled = torch.compile(model, fullgraph=True)
    gradients = []
    for network in (compiled, twin):
        y = network(X)
        y.square().sum().backward()
        gradients.append([y, *(parameter.grad for parameter in network.parameters())])
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(*gradients, strict=True))
