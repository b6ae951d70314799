"""Captured steps on a real GPU, and how a capture that failed ends."""

from __future__ import annotations

import copy
import gc
import itertools
import threading
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from captured_steps import OPTIMIZERS, assert_equal, batches, network, training_state
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from mlp_fused import FusedMLP, capture, capture_step
from mlp_fused.engine import settings
from mlp_fused.kernels.launch import count_launches

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


@pytest.mark.parametrize("name", [kind.__name__ for kind in capture.RATE_IN_MEMORY])
def test_learning_rates_in_memory_are_not_read_back(name: str) -> None:
    """Use fake GPU tensors, whose values cannot be read without an error."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for foreach in (False, None):
            parameter = nn.Parameter(torch.empty(3, 4, device="cuda"))
            optimizer = getattr(torch.optim, name)(
                [parameter], 0.01, capturable=True, foreach=foreach, weight_decay=0.1
            )
            optimizer.param_groups[0]["lr"] = torch.empty((), device="cuda")
            for _ in range(2):
                parameter.grad = torch.empty(3, 4, device="cuda")
                optimizer.step()


class HostReads(TorchDispatchMode):
    """A mode that records the operations that copy values of tensors to the host, which a capture forbids."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name.startswith(self.READS):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_through_the_kernels_reads_nothing_on_the_host(dtype: torch.dtype, device: str, path: str) -> None:
    model = FusedMLP(12, [16, 8, 5], activation_layer="gelu", backend="triton", device=device)
    x, y = next(batches(1, device))
    with HostReads() as reads:
        torch.ones(1).item()
    assert reads.names  # the mode detects a read
    for _ in range(2):  # prepared, then replayed
        with HostReads() as reads, torch.autocast(device, dtype, dtype != torch.float32), count_launches() as launches:
            cross_entropy(model(x), y).backward()
        assert launches
        assert reads.names == []


class Allocator:
    """A stand-in for torch's private calls that end a capture. Those in `refused` raise an error."""

    def __init__(self, refused: tuple[str, ...] = ()) -> None:
        self.refused = refused
        self.calls: list[tuple[str, int, tuple[int, int]]] = []

    def call(self, name: str, index: int, pool: tuple[int, int]) -> None:
        if name in self.refused:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.calls.append((name, index, pool))

    def _cuda_endAllocateToPool(self, index: int, pool: tuple[int, int]) -> None:  # noqa: N802
        self.call("end", index, pool)

    def _cuda_releasePool(self, index: int, pool: tuple[int, int]) -> None:  # noqa: N802
        self.call("release", index, pool)


def test_a_broken_capture_is_ended_for_the_allocator_too() -> None:
    allocator = Allocator()
    settings.end_allocation(3, (0, 7), allocator)
    assert allocator.calls == [("end", 3, (0, 7)), ("release", 3, (0, 7))]


@pytest.mark.parametrize("allocator", [Allocator(refused=("end",)), object()], ids=["ended already", "no such names"])
def test_a_healthy_or_unknown_allocator_is_not_touched(allocator: Any) -> None:
    """After a capture that has ended, its graph releases the pool."""
    settings.end_allocation(0, (0, 1), allocator)
    assert getattr(allocator, "calls", []) == []


def trainable(device: str, **keywords: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = network(device, **keywords)
    return model, torch.optim.Adam(model.parameters(), torch.tensor(1e-3, device=device), capturable=True)


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [(12, 16, 5), (12, 300, 300, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_forward_and_backward(dtype: torch.dtype, widths: tuple[int, ...], device: str, path: str) -> None:
    """Capture a training step with torch.cuda.graph after `warmup`. Everything that it allocates is in the pool."""
    model = FusedMLP(widths[0], list(widths[1:]), activation_layer="gelu", backend="triton", device=device, dtype=dtype)
    static = torch.randn(9, 12, device=device, dtype=dtype)
    dy = torch.randn(9, 5, device=device, dtype=dtype)
    model.warmup(9)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(static).backward(dy)
            with torch.no_grad():
                model(static)
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    inference, training = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(inference, stream=stream), torch.no_grad():
        evaluated = model(static)
    before = {segment["address"] for segment in torch.cuda.memory_snapshot()}
    with torch.cuda.graph(training, stream=stream):
        y = model(static)
        y.backward(dy)
    added = [segment for segment in torch.cuda.memory_snapshot() if segment["address"] not in before]
    assert all(tuple(segment["segment_pool_id"]) == tuple(training.pool()) for segment in added)
    twin = copy.deepcopy(model)
    twin.zero_grad()
    for _ in range(2):
        x = torch.randn_like(static)
        static.copy_(x)
        inference.replay()
        training.replay()
        twin.zero_grad()
        expected = twin(x)
        expected.backward(dy)
        assert torch.equal(y, expected)
        with torch.no_grad():
            assert torch.equal(evaluated, twin(x))
        for mine, other in zip(model.parameters(), twin.parameters()):
            assert torch.equal(mine.grad, other.grad)


@pytest.mark.gpu
def test_torchs_graphed_callables(device: str, path: str) -> None:
    model = FusedMLP(12, [16, 5], backend="triton", device=device)
    twin = copy.deepcopy(model)
    (x, y), (other, _) = batches(2, device)
    graphed = torch.cuda.make_graphed_callables(model, (x.clone(),))
    for run in (graphed, twin):
        cross_entropy(run(other), y).backward()
    for mine, expected in zip(model.parameters(), twin.parameters()):
        assert torch.equal(mine.grad, expected.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("before", [0, 2], ids="after {} steps".format)
@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
@pytest.mark.parametrize("autocast", [False, True], ids="autocast={}".format)
def test_captured_steps_train_like_a_plain_loop(autocast: bool, backend: str, before: int, device: str) -> None:
    results = []
    for captured in (True, False):
        model, optimizer = trainable(device, backend=backend)
        torch.manual_seed(3)
        cast = torch.autocast(device, torch.bfloat16) if autocast else nullcontext()

        def run(x: Tensor, y: Tensor, model=model, optimizer=optimizer, cast=cast) -> Tensor:
            optimizer.zero_grad()
            with cast:
                loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        step = run
        data = list(batches(before + 5, device))
        for x, y in data[:before]:
            step(x, y)
        if captured:
            state = training_state(model, optimizer)
            with cast:
                step = capture_step(model, cross_entropy, optimizer, *data[0])
            assert_equal(training_state(model, optimizer), state)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        losses = []
        for x, y in data[before:]:
            losses.append(step(x, y).clone())
            scheduler.step()
        results.append((losses, training_state(model, optimizer)))
    assert_equal(*results)


@pytest.mark.gpu
def test_a_replayed_step_launches_nothing_from_the_host(device: str) -> None:
    model = FusedMLP(784, [512, 512, 10], device=device)
    optimizer = torch.optim.Adam(model.parameters(), capturable=True, fused=True)
    x, y = torch.randn(64, 784, device=device), torch.randint(10, (64,), device=device)
    step = capture_step(model, cross_entropy, optimizer, x, y)
    first = step(x, y).item()
    allocated = torch.cuda.memory_allocated()
    with count_launches() as launches:
        for _ in range(50):
            loss = step(x, y)
    assert launches == {}
    assert torch.cuda.memory_allocated() == allocated
    assert loss.item() < first / 2


@pytest.mark.gpu
def test_a_capture_works_or_names_an_earlier_loss_that_is_still_held(device: str) -> None:
    model, optimizer = trainable(device)
    x, y = next(batches(1, device))
    loss = cross_entropy(model(x), y)
    loss.backward()
    optimizer.zero_grad()
    try:
        capture_step(model, cross_entropy, optimizer, x, y)
    except RuntimeError as error:
        assert str(error).endswith("if a variable still holds a loss or an output of an earlier step, del it first")  # noqa: PT017
    del loss
    assert capture_step(model, cross_entropy, optimizer, x, y)(x, y).isfinite()


@pytest.mark.gpu
def test_memory_may_be_pinned_by_another_thread_during_the_capture(device: str) -> None:
    model, optimizer = trainable(device)
    x, y = next(batches(1, device))
    failed: list[BaseException] = []
    sizes = itertools.count(1)

    def pinned() -> Tensor:
        return torch.empty(next(sizes) << 20, pin_memory=True)  # of a size that no cache holds, so that it is allocated

    def loss(output: Tensor, y: Tensor) -> Tensor:
        def allocate() -> None:
            try:
                pinned()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=allocate)
        thread.start()
        thread.join()
        return cross_entropy(output, y)

    assert capture_step(model, loss, optimizer, x, y)(x, y).isfinite()
    assert failed == []


@pytest.mark.gpu
def test_a_step_that_waits_for_a_result_cannot_be_captured_and_changes_nothing(device: str) -> None:
    model, optimizer = trainable(device)
    batch = next(batches(1, device))

    def waits(output: Tensor, y: Tensor) -> Tensor:
        loss = cross_entropy(output, y)
        return loss * 2 if loss.item() > 0 else loss

    state = training_state(model, optimizer)
    with pytest.raises(RuntimeError, match="the step cannot be captured"):
        capture_step(model, waits, optimizer, *batch)
    assert_equal(training_state(model, optimizer), state)
    step = capture_step(model, cross_entropy, optimizer, *batch)
    assert torch.isfinite(step(*batch))


@pytest.mark.gpu
def test_memory_is_freed_after_a_failed_capture(device: str) -> None:
    """Memory that another stream used, such as that of a prefetched batch, is free once the stream is done."""
    model, optimizer = trainable(device)
    batch = next(batches(1, device))

    def waits(output: Tensor, y: Tensor) -> Tensor:
        loss = cross_entropy(output, y)
        return loss * 2 if loss.item() > 0 else loss

    def reserved() -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    with pytest.raises(RuntimeError, match="the step cannot be captured"):
        capture_step(model, waits, optimizer, *batch)
    gc.collect()
    before = reserved()
    for _ in range(3):
        prefetched = torch.empty(2**26, device=device)
        prefetched.record_stream(torch.cuda.Stream())
        del prefetched
    assert reserved() == before


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("width", [32, 300], ids=["network", "layer"])
def test_a_captured_step_that_recomputes_has_one_dropout_mask(width: int, backend: str, device: str) -> None:
    """The generator has the same state before both first replays, so gradients with and without recompute agree."""
    if backend == "reference" and TORCH < (2, 10):
        pytest.skip("torch resets its generator within a capture only since 2.10")
    results = []
    for recompute in (True, False):
        torch.manual_seed(1)
        model = FusedMLP(12, [width, width, 5], dropout=0.5, recompute=recompute, backend=backend, device=device)
        step = capture_step(model, cross_entropy, OPTIMIZERS["SGD"](model.parameters()), *next(batches(1, device)))
        torch.manual_seed(3)
        loss = step(*next(batches(1, device))).clone()
        results.append((loss, [parameter.grad for parameter in model.parameters()], model.state_dict()))
    assert_equal(*results)
