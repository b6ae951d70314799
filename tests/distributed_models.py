"""Models, batches and training steps of test_distributed.py, the same in every process."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from mlp_fused import FusedMLP
from mlp_fused.kernels.launch import count_launches

NARROW, WIDE = (12, 20, 24, 6), (12, 300, 6)  # runs as one kernel; runs with one kernel per product
STEPS = 2
ROWS = 8  # in a global batch


def network(backend: str, mesh: DeviceMesh, widths: tuple[int, ...] = NARROW, **arguments: object) -> FusedMLP:
    """A network with the same parameters in every process."""
    torch.manual_seed(1)
    model = FusedMLP(widths[0], list(widths[1:]), activation_layer="gelu", backend=backend, **arguments)  # type: ignore[arg-type]
    return model.to(mesh.device_type)


def plain(model: FusedMLP) -> nn.Sequential:
    """A plain nn.Sequential with copies of the model's parameters."""
    return nn.Sequential(*copy.deepcopy(model))


def batches(mesh: DeviceMesh, widths: tuple[int, ...] = NARROW) -> list[tuple[Tensor, Tensor]]:
    """The global batches for a few steps."""
    generator = torch.Generator().manual_seed(2)
    return [
        tuple(torch.randn(ROWS, width, generator=generator).to(mesh.device_type) for width in (widths[0], widths[-1]))
        for _ in range(STEPS)
    ]  # type: ignore[misc]


def local_rows(mesh: DeviceMesh, rows: Tensor) -> Tensor:
    """This process's part of a batch."""
    return rows.chunk(mesh.size())[mesh.get_rank()]


def train_on(
    model: nn.Module, steps: list[tuple[Tensor, Tensor]], parameters: nn.Module | None = None
) -> dict[str, int]:
    """Train for one step per batch by SGD with momentum. Returns the counts of launched kernels."""
    optimizer = torch.optim.SGD((parameters or model).parameters(), lr=0.1, momentum=0.9)
    with count_launches() as launches:
        for x, y in steps:
            (model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return dict(launches)


def train_on_local_rows(mesh: DeviceMesh, model: nn.Module, widths: tuple[int, ...] = NARROW) -> dict[str, int]:
    """Train on this process's part of every batch."""
    return train_on(model, [(local_rows(mesh, x), local_rows(mesh, y)) for x, y in batches(mesh, widths)])


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def assert_equal(model: nn.Module, expected: nn.Module) -> None:
    """Assert that every parameter equals that of a single process, up to the order in which gradients are added."""
    ours, theirs = dict(model.named_parameters()), dict(expected.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        error = (whole(parameter) - theirs[name].detach()).abs().max()
        assert error <= 1e-6 + 1e-5 * theirs[name].detach().abs().max(), f"{name}: {error}"


def assert_kernels_ran(backend: str, launches: dict[str, int], path: str = "network") -> None:
    """Assert that each forward and backward ran kernels of this path if `backend` has kernels, and none otherwise."""
    if backend == "reference":
        assert launches == {}
        return
    names = {"network": ("network_forward_kernel",), "layer": ("layer_forward_kernel", "wgrad_kernel")}[path]
    assert all(launches.get(name, 0) >= STEPS for name in names), launches
    assert sum(launches.values()) >= 3 * STEPS, launches
