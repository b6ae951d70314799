"""Launches of the kernels, and the tensors that they save for backward."""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import Case, Data, check, gradients, make, oracle
from kernel_runs import PATHS, by_torch, forward, saved_bytes
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mlp_fused import mlp, reference
from mlp_fused.kernels.launch import count_launches


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("path", PATHS)
def test_a_second_backward_gives_the_same_gradients(path: str, activation: str, device: str) -> None:
    case = Case(activation=activation, output_activation=activation)
    data = make(case, device)
    y = forward(case, data, path)
    leaves = list(data.leaves.values())
    first = torch.autograd.grad(y, leaves, data.dy, retain_graph=True)
    second = torch.autograd.grad(y, leaves, data.dy)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("path", PATHS)
def test_after_backward_a_graph_holds_no_tensor(path: str, device: str) -> None:
    """x and computed parameters are freed although y is still alive."""
    data = make(Case(), device)
    computed = [tensor * 1 for tensor in (data.x, *data.weights, *data.biases)]
    held = [weakref.ref(tensor) for tensor in computed]
    with_computed = replace(data, x=computed[0], weights=computed[1:3], biases=computed[3:])
    y = forward(Case(), with_computed, path)
    y.backward(data.dy)
    assert data.weights[0].grad is not None
    del computed, with_computed
    assert [ref() for ref in held] == [None] * 5
    assert y.grad_fn is not None


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_frozen_weights_that_were_computed_for_a_call_are_freed(path: str, is_checkpointed: bool, device: str) -> None:
    """Dequantized weights, for example: after the backward, or after the forward under torch's checkpoint."""
    case = Case(needs="input")
    data, held = make(case, device), []

    def call(x: Tensor) -> Tensor:
        computed = [tensor.clone() for tensor in (*data.weights, *data.biases)]
        held.extend(map(weakref.ref, computed))
        return forward(case, replace(data, x=x, weights=computed[:2], biases=computed[2:]), path)

    y = checkpoint(call, data.x, use_reentrant=False) if is_checkpointed else call(data.x)
    assert any(ref() is not None for ref in held) != is_checkpointed
    y.backward(data.dy)
    assert all(ref() is None for ref in held)
    assert y.grad_fn is not None


@pytest.mark.parametrize("needs", ["input", "weights", "biases", "first layer", "last layer", "nothing"])
@pytest.mark.parametrize("path", ["layer", "run"])
def test_only_needed_gradients_are_computed(path: str, needs: str, device: str) -> None:
    case = Case(widths=(20, 33, 24, 17), activation="gelu", needs=needs)
    data = make(case, device)
    with count_launches() as launches:
        gradients(data, forward(case, data, path))
    dgrads = {"input": 3, "weights": 2, "biases": 2, "first layer": 2, "last layer": 0, "nothing": 0}[needs]
    wgrads = {"input": 0, "weights": 3, "biases": 3, "first layer": 1, "last layer": 1, "nothing": 0}[needs]
    assert launches["layer_forward_kernel"] == 3
    assert launches.get("dgrad_kernel", 0) == dgrads
    assert launches.get("wgrad_kernel", 0) == wgrads


@pytest.mark.parametrize("needs", ["input", "weights", "biases", "first layer", "last layer", "nothing"])
@pytest.mark.parametrize("recompute", [True, False], ids="recompute={}".format)
def test_a_network_is_one_launch_forward_and_at_most_three_backward(recompute: bool, needs: str, device: str) -> None:
    case = Case(dtype=torch.bfloat16, widths=(20, 31, 24, 17), activation="gelu", needs=needs)
    data = make(case, device)
    with count_launches() as launches:
        y = forward(case, data, "network", recompute)
    assert launches == {"network_forward_kernel": 1}
    with count_launches() as launches:
        gradients(data, y)
    sums = 0 if needs in ("input", "nothing") else 1
    dgrad = 0 if needs in ("last layer", "nothing") else 1
    if recompute:
        expected = {"network_one_pass_kernel": int(needs != "nothing"), "sum_partials_kernel": sums}
    else:
        expected = {"network_dgrad_kernel": dgrad, "network_wgrad_kernel": sums, "sum_partials_kernel": sums}
    assert launches == {name: count for name, count in expected.items() if count}


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_tensors_saved_by_a_network(activation: str, device: str) -> None:
    case = Case(64, (32, 48, 16, 8), torch.bfloat16, activation=activation)
    data = make(case, device)
    for recompute, width in ((True, 32), (False, 32 + 48 + 16)):
        assert saved_bytes(partial(forward, case, data, "network", recompute), parameters(data)) == 64 * width * 2


@pytest.mark.parametrize("recompute", [True, False], ids="recompute={}".format)
def test_recompute_decides_what_is_saved(recompute: bool, device: str) -> None:
    """Gradients are the same with both choices, on both paths."""
    for widths in ((20, 32, 24, 17), (20, 300, 17)):
        case = Case(33, widths, activation="gelu")
        data, twin = make(case, device), make(case, device)
        y = []

        def call(data: Data = data, y: list[Tensor] = y) -> None:
            y.append(mlp(data.x, data.weights, data.biases, "gelu", backend="triton", recompute=recompute))

        size = saved_bytes(call, parameters(data))
        assert size == 33 * 4 * (widths[0] if recompute else sum(widths[:-1]))
        check(case, oracle(case, data), gradients(data, y[0]), by_torch(case, twin))


def parameters(data: Data) -> list[Tensor | None]:
    return [*data.weights, *data.biases]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("needs", ["everything", "parameters", "input", "first layer", "last layer"])
@pytest.mark.parametrize("path", ["layer", "run"])
def test_one_tensor_is_saved_per_layer(activation: str, needs: str, path: str, device: str) -> None:
    case = Case(64, (32, 48, 16, 8), activation=activation, needs=needs)
    data = make(case, device)
    size = saved_bytes(lambda: forward(case, data, path), parameters(data))
    x, hidden = 32, [48, 16]
    widths = {
        "everything": x + sum(hidden), "parameters": x + sum(hidden), "input": sum(hidden),
        "first layer": x + sum(hidden), "last layer": hidden[-1],
    }[needs]  # fmt: skip
    assert size == 64 * widths * 4


@pytest.mark.parametrize(("activation", "most"), [("gelu", 0.58), ("silu", 0.58), ("relu", 1.0), ("tanh", 1.0)])
def test_saved_bytes_compared_with_torch(activation: str, most: float, device: str) -> None:
    """A network like the middle one of the benches, with four layers as wide as the input."""
    case = Case(16, (32,) * 5, torch.bfloat16, activation, needs="parameters")
    data, twin = make(case, device), make(case, device)
    ours = saved_bytes(partial(forward, case, data, "layer"), parameters(data))
    by_reference = partial(reference.mlp, twin.x, twin.weights, twin.biases, case.activations)
    torchs = saved_bytes(by_reference, parameters(twin))
    assert 0 < ours <= most * torchs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("activation", "most"), [("gelu", 0.58), ("relu", 1.0)])
def test_memory_held_between_forward_and_backward(
    activation: str, most: float, dtype: torch.dtype, device: str
) -> None:
    """Read the allocator's count. The output is not counted, for ours and for torch.

    On Hopper, products of float32 read planes. They are not held.
    """
    case = Case(4096, (512,) * 5, dtype, activation, needs="parameters")
    data = make(case, device)
    held = []
    for call in (
        partial(forward, case, data, "layer"),
        lambda: reference.mlp(data.x, data.weights, data.biases, case.activations),
    ):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated() - data.x.nbytes  # both save the input
        y = call()
        held.append(torch.cuda.memory_allocated() - before - y.nbytes)
        del y
    assert held[0] <= most * held[1]


@pytest.mark.parametrize("recompute", [None, True, False], ids="recompute={}".format)
def test_saved_tensors_may_return_with_other_strides(recompute: bool | None, device: str) -> None:
    case = Case(layout="strided parameters", dtype=torch.float16)
    data, twin = make(case, device), make(case, device)
    pack, unpack = (lambda tensor: tensor), (lambda tensor: tensor.clone(memory_format=torch.contiguous_format))
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = forward(case, data, "network", recompute)
    check(case, oracle(case, twin), gradients(data, y), by_torch(case, twin))


def test_tensors_that_backward_does_not_read_may_change(device: str) -> None:
    """Every bias may change, and so may the first weight if x needs no gradient: the same as in torch."""
    case = Case(widths=(5, 3), needs="parameters")
    data = make(case, device)
    y = forward(case, data, "network", recompute=False)
    with torch.no_grad():
        data.weights[0].mul_(2)
        data.biases[0].mul_(2)
    y.backward(data.dy)


@pytest.mark.parametrize("path", PATHS)
def test_a_changed_weight_is_detected_as_by_torch(path: str, device: str) -> None:
    data = make(Case(), device)
    y = forward(Case(), data, path)
    with torch.no_grad():
        data.weights[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(data.dy)
