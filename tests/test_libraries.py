"""Libraries that modify every nn.Linear of a model give the plain twin's numbers, with and without the kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from libraries import needs
from torch import Tensor, nn

from mlp_fused import FusedLinear, fuse
from mlp_fused.kernels.launch import count_launches

BACKENDS = pytest.mark.parametrize("backend", ["auto", "triton"])
WIDTHS = (32, 64, 32, 16)  # quantisers take groups of 32 weights, float8 products multiples of 16


def pair(backend: str, device: str) -> tuple[nn.Sequential, nn.Sequential]:
    """A fused network with FusedLinear in it, and the same in torch's modules, with equal parameters."""
    first, second, third, last = WIDTHS
    theirs = nn.Sequential(
        nn.Linear(first, second), nn.ReLU(), nn.Linear(second, third), nn.Linear(third, last), nn.Tanh()
    ).to(device)
    ours = nn.Sequential(
        FusedLinear(first, second, activation="relu"),
        nn.Linear(second, third),
        FusedLinear(third, last, activation="tanh"),
    ).to(device)
    for layer, linear in zip((0, 1, 2), (0, 2, 3)):
        ours[layer].load_state_dict(theirs[linear].state_dict())
    fuse(ours, backend=backend)
    return ours, theirs


def rows(device: str, number: int = 32) -> Tensor:
    return torch.randn(number, WIDTHS[0], device=device)


def results(network: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of the trainable parameters."""
    x = x.detach().clone().requires_grad_()
    y = network(x)
    leaves = [x, *(parameter for parameter in network.parameters() if parameter.requires_grad)]
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


def assert_agree(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    for mine, other in zip(results(ours, x), results(theirs, x), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def launched(network: nn.Module, x: Tensor) -> bool:
    with count_launches() as launches:
        network(x)
    return bool(launches)


def test_a_missing_library_fails_if_all_are_required() -> None:
    assert needs("no_such_library", required=False).args == (True,)
    assert needs("no_such_library", required=True).args == (False,)
    assert needs("torch", required=False).args == (False,)
    ci = Path(__file__).parent.parent / ".ci" / "run"
    assert "MLP_FUSED_TEST_LIBRARIES=required" in ci.read_text()


def leave_to_torch(backend: str, network: Any) -> None:
    """Choose plain torch for quantised weights, which backend="triton" refuses with the reason."""
    if backend == "triton":
        with pytest.raises(
            RuntimeError,
            match=r'backend is "triton", but a weight is of the subclass .*; backend="auto" runs plain torch',
        ):
            network(rows(str(network[1].weight.device)))
        network.backend = "auto"


@needs("torchao")
@BACKENDS
@pytest.mark.parametrize("emulate", [True, False], ids=["emulated", "products"])
def test_torchao_float8_training(emulate: bool, backend: str, device: str) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    ours, theirs = pair(backend, device)
    x = rows(device)
    assert_agree(ours, theirs, x)
    before = theirs(x)
    config = Float8LinearConfig(emulate=emulate)
    ours, theirs = (convert_to_float8_training(network, config=config) for network in (ours, theirs))
    assert type(ours[0]) is FusedLinear
    assert type(ours[0].linear) is type(theirs[0]) is not nn.Linear
    for _ in range(2):
        assert_agree(ours, theirs, x)
    assert not torch.allclose(ours(x), before)


def fake_quantised() -> dict[str, Callable[[], Any]]:
    """torchao's ways of preparing a model for quantisation-aware training."""

    def by_base() -> Any:
        from torchao.quantization import Int8DynamicActivationIntxWeightConfig, PerGroup
        from torchao.quantization.qat import QATConfig

        base = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
        return QATConfig(base, step="prepare"), QATConfig(base, step="convert")

    def by_fake() -> Any:
        from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

        activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
        weight = IntxFakeQuantizeConfig(torch.int4, group_size=32)
        return QATConfig(activation_config=activation, weight_config=weight, step="prepare"), None

    return {"by a base config": by_base, "by fake quantisers": by_fake}


@needs("torchao")
@BACKENDS
@pytest.mark.parametrize("how", fake_quantised())
def test_torchao_quantisation_aware_training(how: str, backend: str, device: str) -> None:
    from torchao.quantization import quantize_

    ours, theirs = pair(backend, device)
    x = rows(device)
    assert_agree(ours, theirs, x)
    before = theirs(x)
    prepare, convert = fake_quantised()[how]()
    for network in (ours, theirs):
        quantize_(network, prepare)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            network(x).square().mean().backward()
            optimizer.step()
    assert type(ours[0].linear) is type(theirs[0]) is not nn.Linear
    assert_agree(ours, theirs, x)
    assert not torch.allclose(ours(x), before)
    if convert is not None:
        for network in (ours, theirs):
            quantize_(network, convert)
        leave_to_torch(backend, ours)
        torch.testing.assert_close(ours(x), theirs(x))


@needs("torchao")
@BACKENDS
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao_int8(config: str, backend: str, device: str) -> None:
    import torchao.quantization as quantisation

    ours, theirs = pair(backend, device)
    x = rows(device)
    with torch.no_grad():
        before = ours(x)
        for network in (ours, theirs):
            quantisation.quantize_(network, getattr(quantisation, config)())
        assert type(ours[0].weight) is type(theirs[0].weight) is not nn.Parameter
        leave_to_torch(backend, ours)
        for _ in range(2):
            torch.testing.assert_close(ours(x), theirs(x))
        assert not torch.equal(ours(x), before)


@needs("peft")
@BACKENDS
@pytest.mark.parametrize(
    ("our_targets", "their_targets"),
    [(["0.linear", "1"], ["0", "2"]), (["linear"], ["0", "3"]), (r".*\.linear", r"0|3"), ("all-linear", "all-linear")],
    ids=["names", "suffix", "expression", "all-linear"],
)
def test_peft_lora_merged_equals_unmerged(our_targets: Any, their_targets: Any, backend: str, device: str) -> None:
    from peft import LoraConfig, get_peft_model

    networks = pair(backend, device)
    x = rows(device)
    assert_agree(*networks, x)
    before = networks[1](x)
    outputs = []
    for network, targets in zip(networks, (our_targets, their_targets)):
        torch.manual_seed(3)
        adapted = get_peft_model(network, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        optimizer = torch.optim.SGD(
            (parameter for parameter in adapted.parameters() if parameter.requires_grad), lr=0.1
        )
        for _ in range(2):
            optimizer.zero_grad()
            adapted(x).square().mean().backward()
            optimizer.step()
        unmerged = adapted(x)
        adapted.merge_adapter()
        merged = adapted(x)
        adapted.unmerge_adapter()
        with adapted.disable_adapter():
            disabled = adapted(x)
        whole = adapted.merge_and_unload()
        assert whole is network
        outputs.append([unmerged, merged, adapted(x), disabled, whole(x)])
    for mine, other in zip(*outputs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    unmerged, merged, _, disabled, unloaded = outputs[0]
    torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unloaded, unmerged, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(disabled, before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(unmerged, before)
    assert launched(networks[0], x) == (backend == "triton" or device == "cuda")


@needs("peft")
def test_peft_refuses_a_fused_linear_as_target() -> None:
    from peft import LoraConfig, get_peft_model

    network, _ = pair("auto", "cpu")
    with pytest.raises(ValueError, match=r"(?s)FusedLinear.*is not supported"):
        get_peft_model(network, LoraConfig(r=4, target_modules=["0"]))


@needs("peft")
@BACKENDS
def test_peft_adapters_are_saved_and_loaded(backend: str, device: str, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    network, _ = pair(backend, device)
    base, x = copy.deepcopy(network), rows(device)
    adapted = get_peft_model(network, LoraConfig(r=4, target_modules=["linear"], init_lora_weights=False))
    adapted.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(base, str(tmp_path))
    torch.testing.assert_close(loaded(x), adapted(x), rtol=1e-5, atol=1e-6)


@needs("accelerate")
@BACKENDS
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_trains_and_saves(precision: str, backend: str, device: str, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=precision, gradient_accumulation_steps=2)
    data = torch.utils.data.TensorDataset(torch.randn(32, WIDTHS[0]), torch.randn(32, WIDTHS[-1]))
    x = rows(device)
    outputs = []
    networks = pair(backend, device)
    for network in networks:
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
        loader = torch.utils.data.DataLoader(data, batch_size=8)
        prepared, optimizer, loader = accelerator.prepare(network, optimizer, loader)
        with count_launches() as launches:
            for inputs, targets in loader:
                with accelerator.accumulate(prepared):
                    accelerator.backward((prepared(inputs) - targets).square().mean())
                    accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
        assert bool(launches) == (network is networks[0] and (backend == "triton" or device == "cuda"))
        whole = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert whole is network
        outputs.append(whole(x))
    tolerance = 1e-5 if precision == "no" else 2e-2
    torch.testing.assert_close(outputs[0], outputs[1], rtol=tolerance, atol=tolerance)
    accelerator.save_model(networks[0], str(tmp_path))
    from accelerate import load_checkpoint_in_model

    other, _ = pair(backend, device)
    load_checkpoint_in_model(other, str(tmp_path))
    assert torch.equal(other(x), outputs[0])


@needs("accelerate")
@BACKENDS
def test_accelerate_offloads_and_dispatches(backend: str, device: str, tmp_path: Path) -> None:
    from accelerate import cpu_offload, init_empty_weights, load_checkpoint_and_dispatch

    ours, theirs = pair(backend, device)
    x = rows(device)
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
    torch.save(ours.state_dict(), tmp_path / "pytorch_model.bin")
    cpu_offload(ours, torch.device(device))
    assert ours[0].weight.device.type == "meta"
    for _ in range(2):
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)
    with init_empty_weights():
        empty, _ = pair(backend, "meta")
    assert empty[0].weight.device.type == "meta"
    dispatched = load_checkpoint_and_dispatch(empty, str(tmp_path / "pytorch_model.bin"), device_map={"": device})
    torch.testing.assert_close(dispatched(x), expected, rtol=1e-4, atol=1e-5)
