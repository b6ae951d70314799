"""DDP, FSDP2 and tensor parallelism: two processes compute the results of one, by kernels wherever possible.

Processes are started once and run all checks one after another. A test for each check reads its result. On the CPU
there are two processes (gloo), and under `-m gpu` one for each of up to two GPUs (NCCL).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import json
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distributed_models import (
    NARROW,
    ROWS,
    WIDE,
    assert_equal,
    assert_kernels_ran,
    batches,
    local_rows,
    network,
    plain,
    train_on,
    train_on_local_rows,
    whole,
)
from interpreter import take_shortcuts
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from mlp_fused import FusedLinear, FusedMLP, fuse, module
from mlp_fused.checkpoint import load_checkpoint
from mlp_fused.dtypes import pick_device
from mlp_fused.kernels.launch import count_launches
from mlp_fused.train.config import Config, build_model
from mlp_fused.train.distributed import join
from mlp_fused.train.loop import Result, train

pytestmark = pytest.mark.alone

Check = Callable[[DeviceMesh, str], None]
CHECKS: dict[str, Check] = {}
BACKENDS = ("reference", "triton")


def check(function: Check) -> Check:
    """Register a check, which every process runs once for each backend. Its result is reported as a test."""
    CHECKS[function.__name__] = function
    return function


@check
def ddp(mesh: DeviceMesh, backend: str) -> None:
    for widths, path, options in (
        (NARROW, "network", {}),
        (NARROW, "network", {"static_graph": True, "gradient_as_bucket_view": True}),
        (WIDE, "layer", {"bucket_cap_mb": 0.001}),
    ):
        model = network(backend, mesh, widths)
        expected = plain(model)
        assert_kernels_ran(backend, train_on_local_rows(mesh, DistributedDataParallel(model, **options), widths), path)
        train_on(expected, batches(mesh, widths))
        assert_equal(model, expected)


@check
def ddp_accumulates_without_synchronising(mesh: DeviceMesh, backend: str) -> None:
    model = network(backend, mesh)
    expected = plain(model)
    parallel = DistributedDataParallel(model)
    (x, y), (later_x, later_y) = batches(mesh)
    with parallel.no_sync():
        (parallel(local_rows(mesh, x)) - local_rows(mesh, y)).square().mean().backward()
    (parallel(local_rows(mesh, later_x)) - local_rows(mesh, later_y)).square().mean().backward()
    for inputs, targets in ((x, y), (later_x, later_y)):
        (expected(inputs) - targets).square().mean().backward()
    for ours, theirs in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@check
def ddp_with_layers_that_are_frozen_or_unused(mesh: DeviceMesh, backend: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = network(backend, mesh), network(backend, mesh)
            self.used[0].requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    two = Two()
    expected = plain(two.used)
    assert_kernels_ran(backend, train_on_local_rows(mesh, DistributedDataParallel(two, find_unused_parameters=True)))
    train_on(expected, batches(mesh))
    assert_equal(two.used, expected)


@check
def fsdp_of_the_whole_network_is_fused(mesh: DeviceMesh, backend: str) -> None:
    for widths, path in ((NARROW, "network"), (WIDE, "layer")):
        for reshard in (True, False):
            model = network(backend, mesh, widths)
            expected = plain(model)
            explained = str(model.explain(ROWS))
            fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
            with count_launches() as launches:
                model.warmup(ROWS)
            assert bool(launches) == (backend == "triton")
            assert_kernels_ran(backend, train_on_local_rows(mesh, model, widths), path)
            train_on(expected, batches(mesh, widths))
            assert_equal(model, expected)
            assert str(model.explain(ROWS)) == explained


@check
def fsdp_of_a_parent_module_is_fused(mesh: DeviceMesh, backend: str) -> None:
    model = nn.Sequential(nn.LayerNorm(12, device=mesh.device_type), network(backend, mesh))
    expected = nn.Sequential(copy.deepcopy(model[0]), plain(model[1]))
    fully_shard(model, mesh=mesh)
    assert_kernels_ran(backend, train_on_local_rows(mesh, model))
    train_on(expected, batches(mesh))
    assert_equal(model, expected)


@check
def fsdp_that_recomputes(mesh: DeviceMesh, backend: str) -> None:
    for widths, path in ((NARROW, "network"), (WIDE, "layer")):
        model = network(backend, mesh, widths, recompute=True)
        expected = plain(model)
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        assert_kernels_ran(backend, train_on_local_rows(mesh, model, widths), path)
        train_on(expected, batches(mesh, widths))
        assert_equal(model, expected)


@check
def fsdp_in_mixed_precision(mesh: DeviceMesh, backend: str) -> None:
    """The error against fp32 is at most twice that of nn.Sequential under the same policy."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for reshard in (True, False):
        model = network(backend, mesh)
        torchs, exact = plain(model), plain(model)
        for sharded in (model, torchs):
            fully_shard(sharded, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
        assert model.explain(ROWS).dtype == torch.bfloat16
        with pytest.MonkeyPatch.context() as patch:
            warmed = MagicMock(wraps=module.run_kernels)
            patch.setattr(module, "run_kernels", warmed)
            model.warmup(ROWS)
        assert bool(warmed.call_args_list) == (backend == "triton" or mesh.device_type == "cuda")
        assert {call.args[2] for call in warmed.call_args_list} <= {torch.bfloat16}
        assert model(local_rows(mesh, batches(mesh)[0][0])).dtype == torch.bfloat16
        model.reshard()  # torch does this in backward, which does not run here
        assert_kernels_ran(backend, train_on_local_rows(mesh, model))
        train_on_local_rows(mesh, torchs)
        train_on(exact, batches(mesh))
        for ours, theirs, true in zip(model.parameters(), torchs.parameters(), exact.parameters()):
            assert ours.dtype == torch.float32
            error, slack = (torch.linalg.vector_norm(whole(parameter) - true.detach()) for parameter in (ours, theirs))
            assert error <= 2 * slack + 1e-4 * torch.linalg.vector_norm(true)


@check
def fsdp_of_each_layer_runs_its_children_as_modules(mesh: DeviceMesh, backend: str) -> None:
    model = network(backend, mesh)
    expected = plain(model)
    model(batches(mesh)[0][0])  # caches a path before the sharding
    for child in model:
        if isinstance(child, nn.Linear):
            fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert train_on_local_rows(mesh, model) == {}
    train_on(expected, batches(mesh))
    assert_equal(model, expected)
    runs = [run for run in model.explain(ROWS).runs if "Linear" in run.children]
    assert len(runs) == 3
    assert all(run.path == "reference" and "fully_shard was called on it" in run.reason for run in runs)


@check
def fsdp_of_one_layer_leaves_the_others_fused(mesh: DeviceMesh, backend: str) -> None:
    model = network(backend, mesh)
    expected = plain(model)
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert_kernels_ran(backend, train_on_local_rows(mesh, model))
    train_on(expected, batches(mesh))
    assert_equal(model, expected)
    first, *others = [run for run in model.explain(ROWS).runs if "Linear" in run.children]
    assert "fully_shard was called on it" in first.reason
    assert all("fully_shard" not in run.reason for run in others)


@check
def fsdp_of_a_fused_linear(mesh: DeviceMesh, backend: str) -> None:
    torch.manual_seed(1)
    layer = FusedLinear(12, 6, activation="silu", backend=backend).to(mesh.device_type)
    expected = nn.Sequential(nn.Linear(12, 6, device=mesh.device_type), nn.SiLU())
    expected[0].load_state_dict(layer.linear.state_dict())
    fully_shard(layer, mesh=mesh)
    launches = train_on_local_rows(mesh, layer)
    assert bool(launches) == (backend == "triton")
    train_on(expected, batches(mesh))
    assert_equal(layer.linear, expected[0])


def with_fused_linears(backend: str, mesh: DeviceMesh) -> tuple[nn.Sequential, nn.Sequential]:
    """A fused network with FusedLinear in it and its plain twin, with the same parameters in every process."""
    torch.manual_seed(1)
    model = nn.Sequential(
        FusedLinear(12, 20, activation="gelu"), nn.Linear(20, 24), FusedLinear(24, 6, activation="tanh")
    )
    theirs = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 24), nn.Linear(24, 6), nn.Tanh())
    theirs.load_state_dict(dict(zip(theirs.state_dict(), model.state_dict().values())))
    fuse(model, backend=backend)
    return model.to(mesh.device_type), theirs.to(mesh.device_type)


def assert_equal_values(model: nn.Module, expected: nn.Module) -> None:
    """Compare like `assert_equal`, for networks whose parameters have the same order and other names."""
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(whole(ours), theirs.detach(), rtol=1e-5, atol=1e-6)


@check
def fsdp_of_a_network_with_fused_linears(mesh: DeviceMesh, backend: str) -> None:
    for shard in ("all", "the child", "the layer"):
        model, expected = with_fused_linears(backend, mesh)
        if shard == "the child":
            fully_shard(model[0].linear, mesh=mesh)
        elif shard == "the layer":
            fully_shard(model[0], mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert_kernels_ran(backend, train_on_local_rows(mesh, model))
        train_on(expected, batches(mesh))
        assert_equal_values(model, expected)


@check
def dcp_saves_and_loads_fused_linears_with_an_optimizer(mesh: DeviceMesh, backend: str) -> None:
    model, expected = with_fused_linears(backend, mesh)
    resumed, _ = with_fused_linears(backend, mesh)
    nn.init.zeros_(resumed[0].weight)
    folder = [tempfile.mkdtemp()] if mesh.get_rank() == 0 else [""]
    dist.broadcast_object_list(folder, src=0)
    for sharded in (model, resumed):
        fully_shard(sharded, mesh=mesh)
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.05) for net in (model, expected, resumed)]

    def advance(network: nn.Module, optimizer: torch.optim.Optimizer, local: bool) -> None:
        for x, y in batches(mesh):
            x, y = (local_rows(mesh, x), local_rows(mesh, y)) if local else (x, y)
            optimizer.zero_grad()
            (network(x) - y).square().mean().backward()
            optimizer.step()

    advance(model, optimizers[0], local=True)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizers[0])))
    assert "0.linear.weight" in state["model"]
    dcp.save(state, checkpoint_id=folder[0])
    state = dict(zip(("model", "optimizer"), get_state_dict(resumed, optimizers[2])))
    dcp.load(state, checkpoint_id=folder[0])
    set_state_dict(resumed, optimizers[2], model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    advance(resumed, optimizers[2], local=True)
    for _ in range(2):
        advance(expected, optimizers[1], local=False)
    for ours, theirs in zip(resumed.parameters(), expected.parameters(), strict=True):  # Adam divides by small numbers
        torch.testing.assert_close(whole(ours), theirs.detach(), rtol=1e-3, atol=1e-4)


@check
def fsdp_checkpoints_equal_those_of_a_sequential(mesh: DeviceMesh, backend: str) -> None:
    model = network(backend, mesh)
    fully_shard(model, mesh=mesh)
    train_on_local_rows(mesh, model)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    expected = plain(network(backend, mesh))
    expected.load_state_dict(state)
    assert_equal(model, expected)
    x = batches(mesh)[0][0]
    torch.testing.assert_close(model(x), expected(x), rtol=1e-5, atol=1e-6)
    model.reshard()  # torch does this in backward, which does not run here
    doubled = {name: 2 * value for name, value in expected.state_dict().items()}
    set_model_state_dict(model, copy.deepcopy(doubled), options=StateDictOptions(full_state_dict=True))
    expected.load_state_dict(doubled)
    torch.testing.assert_close(model(x), expected(x), rtol=1e-5, atol=1e-6)


@check
def tensor_parallel_layers_run_as_modules(mesh: DeviceMesh, backend: str) -> None:
    model = network("auto", mesh)
    model.backend = "auto" if backend == "triton" else backend
    expected = plain(model)
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "3": RowwiseParallel()})
    runs = [run for run in model.explain(ROWS).runs if "Linear" in run.children]
    assert [run.path for run in runs][:2] == ["reference"] * 2
    assert all("the weight is a DTensor, split over processes" in run.reason for run in runs[:2])
    train_on(model, batches(mesh))  # every process has the whole batch
    train_on(expected, batches(mesh))
    assert_equal(model, expected)
    model.backend = "triton"
    with pytest.raises(RuntimeError, match="but child 0, 3 cannot run on kernels: the weight is a DTensor.*runs plain"):
        model(batches(mesh)[0][0])


@check
def tensor_parallel_fused_linear(mesh: DeviceMesh, backend: str) -> None:
    torch.manual_seed(1)
    layers = [FusedLinear(12, 20, activation="gelu"), FusedLinear(20, 6, activation="tanh")]
    model = nn.Sequential(*layers).to(mesh.device_type)
    expected = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 6), nn.Tanh()).to(mesh.device_type)
    for ours, theirs in zip(model, (expected[0], expected[2])):
        theirs.load_state_dict(ours.linear.state_dict())
        ours.backend = "auto" if backend == "triton" else backend
    parallelize_module(model, mesh, {"0.linear": ColwiseParallel(), "1.linear": RowwiseParallel()})
    train_on(model, batches(mesh))
    train_on(expected, batches(mesh))
    for ours, theirs in zip(model, (expected[0], expected[2])):
        assert_equal(ours.linear, theirs)
    model[0].backend = "triton"
    with pytest.raises(RuntimeError, match="but child linear cannot run on kernels: the weight is a DTensor"):
        model(batches(mesh)[0][0])
    with pytest.raises(NotImplementedError, match="only support nn.Linear and nn.Embedding"):
        parallelize_module(nn.Sequential(FusedLinear(12, 20)), mesh, {"0": ColwiseParallel()})


SMALL = Config(hidden=(8,), epochs=3, batch_size=16, validation_fraction=0.27, lr=0.02)
TRAININGS: dict[str, Callable[[Path, str], None]] = {}


def training_check(function: Callable[[Path, str], None]) -> Callable[[Path, str], None]:
    """Register a check of the training loop, which joins the processes itself.

    51 rows are for training. A batch of 16 gives 8 rows to each of two processes, and the last batch 2 and 1.
    """
    TRAININGS[function.__name__] = function
    return function


def trained(folder: Path, backend: str, build: Any = build_model, **changes: Any) -> Result:
    options = {"data": str(folder / "data.npz"), "backend": backend, "device": folder.name}
    return train(dataclasses.replace(SMALL, **options | changes), build=build, report=lambda text: None)


def trained_alone(folder: Path, backend: str, build: Any = build_model, **changes: Any) -> Result:
    """The result of the same training by one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "1")
        return trained(folder, backend, build, **changes)


def assert_same_training(one: Result, other: Result) -> None:
    assert one.losses == pytest.approx(other.losses, rel=1e-4, abs=1e-5)
    assert [epoch.accuracy for epoch in one.history] == [epoch.accuracy for epoch in other.history]
    ours, theirs = ([epoch.validation_loss for epoch in result.history] for result in (one, other))
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert one.model.state_dict().keys() == other.model.state_dict().keys()


def normed(features: int, classes: int, config: Config) -> nn.Module:
    """A network whose buffers depend on the rows that it sees."""
    return FusedMLP(features, [8, classes], nn.LayerNorm, backend=config.backend).insert(0, nn.BatchNorm1d(features))


@training_check
def training_equals_that_of_one_process(folder: Path, backend: str) -> None:
    with count_launches() as launches:
        together = trained(folder, backend)
    assert bool(launches) == (backend == "triton" or folder.name == "cuda")
    assert len(together.losses) == 3 * 4
    assert_same_training(together, trained_alone(folder, backend))


@training_check
def a_regression_equals_that_of_one_process(folder: Path, backend: str) -> None:
    x = np.random.default_rng(0).normal(size=(50, 3))
    path = folder / f"regression {os.environ['RANK']}.npz"
    np.savez(path, x=x, y=1000 + 30 * x.sum(axis=1))
    changes = {"data": str(path), "task": "regression", "hidden": (5,)}
    together, alone = (run(folder, backend, **changes) for run in (trained, trained_alone))
    assert_same_training(together, alone)
    for ours, one in zip(together.history, alone.history, strict=True):
        assert ours.r2 == pytest.approx(one.r2, rel=1e-4)
        assert ours.rmse == pytest.approx(one.rmse, rel=1e-4)


@training_check
def sgd_and_bf16_equal_those_of_one_process(folder: Path, backend: str) -> None:
    changes = {"optimizer": "sgd", "validation_fraction": 0.3}  # the last batch is a single row
    assert_same_training(trained(folder, backend, **changes), trained_alone(folder, backend, **changes))
    together, alone = (run(folder, backend, dtype="bf16") for run in (trained, trained_alone))
    assert together.losses == pytest.approx(alone.losses, rel=0.05, abs=0.02)


@training_check
def a_checkpoint_resumes_with_any_number_of_processes(folder: Path, backend: str) -> None:
    whole = trained_alone(folder, backend)
    path = str(folder / f"{backend} together.pt")
    trained(folder, backend, checkpoint=path, epochs=1)
    assert load_checkpoint(path)["model"].keys() == whole.model.state_dict().keys()
    own_file = str(folder / f"{backend} {os.environ['RANK']}.pt")  # so that both can resume from it
    Path(own_file).write_bytes(Path(path).read_bytes())
    assert_same_training_after(1, trained_alone(folder, backend, checkpoint=own_file, resume=True), whole)
    alone = str(folder / f"{backend} alone.pt")
    if os.environ["RANK"] == "0":
        trained_alone(folder, backend, checkpoint=alone, epochs=2)
    trained(folder, backend, epochs=1)  # waits for all processes
    assert_same_training_after(2, trained(folder, backend, checkpoint=alone, resume=True), whole)


def assert_same_training_after(epochs: int, resumed: Result, whole: Result) -> None:
    assert_same_training(dataclasses.replace(resumed, losses=whole.losses[: 4 * epochs] + resumed.losses), whole)


@training_check
def a_resumed_run_equals_an_uninterrupted_one(folder: Path, backend: str) -> None:
    """All results are bit-identical, with Dropout in every process."""
    whole = trained(folder, backend, dropout=0.5)
    path = str(folder / f"{backend} resumed.pt")
    first = trained(folder, backend, dropout=0.5, checkpoint=path, epochs=1)
    torch.manual_seed(99)  # other code may draw random numbers in between
    resumed = trained(folder, backend, dropout=0.5, checkpoint=path, resume=True)
    assert first.losses + resumed.losses == whole.losses
    assert first.history == whole.history[:1]
    assert resumed.history == whole.history
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


@training_check
def every_process_ends_with_the_same_network(folder: Path, backend: str) -> None:
    result = trained(folder, backend, normed, validation_fraction=0.2)  # BatchNorm takes two rows and more
    state = {name: value.tolist() for name, value in result.model.state_dict().items()}
    with join(functools.partial(pick_device, folder.name)) as processes:
        assert processes.gather((state, result.losses, result.history)) == [(state, result.losses, result.history)] * (
            processes.count
        )


@training_check
def one_process_draws_and_reports(folder: Path, backend: str) -> None:
    lines: list[str] = []
    config = dataclasses.replace(SMALL, data=str(folder / "data.npz"), backend=backend, device=folder.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", terminal := Terminal())
        train(config, report=lines.append)
    is_first = os.environ["RANK"] == "0"
    assert bool(lines) == is_first
    assert ("epoch 3/3" in terminal.getvalue()) == is_first


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def error_text(function: Callable[..., None], *arguments: Any) -> str:
    try:
        function(*arguments)
    except Exception:
        return traceback.format_exc()
    return ""


def run_checks(rank: int, count: int, device: str, ports: list[int], folder: Path) -> None:
    """Run all checks in one process and write their errors to a file."""
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(ports[0]),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
    )
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        take_shortcuts()
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=60))
    mesh = init_device_mesh(device, (count,))
    results = {
        f"{name}-{backend}": error_text(function, mesh, backend)
        for name, function in CHECKS.items()
        for backend in BACKENDS
    }
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(ports[1])
    for name, training in TRAININGS.items():
        results[f"{name}-auto"] = error_text(training, folder / device, "auto")
    training = training_equals_that_of_one_process
    results[f"{training.__name__}-triton"] = error_text(training, folder / device, "triton")
    (folder / f"{rank}.json").write_text(json.dumps(results))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def results(device: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The failures of each process, by check."""
    count = 2 if device == "cpu" else min(2, torch.cuda.device_count())
    folder = tmp_path_factory.mktemp("results")
    (folder / device).mkdir()
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 70)
    np.savez(folder / device / "data.npz", x=random.normal(size=(70, 6)) + y[:, None], y=y)
    mp.spawn(run_checks, (count, device, [free_port(), free_port()], folder), nprocs=count)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHECKS)
def test_models(name: str, backend: str, results: list[dict[str, str]], device: str) -> None:
    for rank, errors in enumerate(results):
        assert errors[f"{name}-{backend}"] == "", f"process {rank}"


@pytest.mark.parametrize(
    "check", [*(f"{name}-auto" for name in TRAININGS), "training_equals_that_of_one_process-triton"]
)
def test_training(check: str, results: list[dict[str, str]], device: str) -> None:
    for rank, errors in enumerate(results):
        assert errors[check] == "", f"process {rank}"
