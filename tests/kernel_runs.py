"""Runs of the table of cases through the kernels and through torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from cases import SEED, Case, Data, gradients, through_torch
from torch import Tensor

from mlp_fused.engine import autograd
from mlp_fused.engine.autograd import run_layers, run_network
from mlp_fused.engine.network_path import NetworkPath
from mlp_fused.engine.paths import find_layers, find_network
from mlp_fused.reference import Layer

PATHS = ("layer", "run", "network")  # one autograd.Function for each layer; one for all layers; one kernel


def find(case: Case, data: Data, recompute: bool | None = None) -> tuple[Tensor, list[Layer], NetworkPath | str]:
    """x as rows, the layers, and the network path for them."""
    layers = [Layer(*layer, case.dropout) for layer in zip(data.weights, data.biases, case.activations)]
    x = data.x.reshape(-1, data.x.shape[-1])
    return x, layers, find_network(x, layers, case.dtype, recompute)


def forward(case: Case, data: Data, path: str, recompute: bool | None = None) -> Tensor:
    """y through the kernels of a path."""
    x, layers, network_path = find(case, data, recompute)
    torch.manual_seed(SEED)
    if path != "network":
        with pytest.MonkeyPatch.context() as patch:
            if path == "layer":
                patch.setattr(autograd, "LAUNCH_BOUND", -1)
            y = run_layers(x, data.weights, data.biases, find_layers(x, layers, case.dtype, "triton"))
    else:
        assert isinstance(network_path, NetworkPath), network_path
        y = run_network(x, tuple(data.weights), tuple(data.biases), network_path)
    return y.view(*data.x.shape[:-1], y.shape[-1])


def by_torch(case: Case, data: Data) -> dict[str, Tensor]:
    """y and the gradients, computed by torch in the dtype of the case."""
    twin = data.to(case.dtype)
    return gradients(twin, through_torch(case, twin))


def case_id(value: object) -> str:
    return value.id if isinstance(value, Case) else str(value)


def saved_bytes(call: Callable[[], object], parameters: Iterable[Tensor | None]) -> int:
    """The bytes that a call saves for backward, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters if parameter is not None}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call()
    del y
    return sum(sizes.values())
