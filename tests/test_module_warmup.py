"""`model.warmup` prepares the launches of later calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mlp_fused import FusedMLP
from mlp_fused.kernels.launch import count_launches


def test_warmup_prepares_every_launch_of_a_call_and_changes_nothing(device: str) -> None:
    model = FusedMLP(20, [300, 24, 5], nn.BatchNorm1d, "gelu", dropout=0.5, backend="triton", device=device)
    model[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    with count_launches() as launches:
        seconds = model.warmup(8)
    assert seconds > 0
    # Without and with gradients. A norm separates the layers.
    assert launches["layer_forward_kernel"] + launches.get("network_forward_kernel", 0) == 2 * 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    with count_launches() as again:
        model.warmup(8, 16, training=False)
    assert sum(again.values()) == 2 * 3


@pytest.mark.parametrize("created_inside", [False, True])
def test_warmup_under_inference_mode(created_inside: bool, device: str) -> None:
    with torch.inference_mode(created_inside):
        model = FusedMLP(300, [300, 5], backend="triton", device=device)
    with torch.inference_mode(), count_launches() as launches:
        model.warmup(8)
        assert model(torch.zeros(8, 300, device=device)).shape == (8, 5)
    assert launches["layer_forward_kernel"] == 2 * 3
    assert launches.get("wgrad_kernel", 0) == (0 if created_inside else 2)


def test_warmup_does_nothing_if_torch_runs() -> None:
    with count_launches() as launches:
        FusedMLP(4, [5, 3]).warmup(8)
    assert launches == {}


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ((), "batch_sizes is empty; it needs one number of rows or more"),
        ((0,), "batch_size is 0; it needs to be a number of rows, 1 or more"),
        ((8, True), "batch_size is True; it needs to be a number of rows, 1 or more"),
    ],
)
def test_warmup_refuses_wrong_batch_sizes(sizes: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        FusedMLP(4, [5, 3]).warmup(*sizes)
