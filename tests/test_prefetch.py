"""DevicePrefetcher compared with a plain loader, and on simulated streams that detect every missing wait."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_streams import LATE, Streams, equal, prefetch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from mlp_fused import DevicePrefetcher
from mlp_fused import prefetch as prefetch_module

HERE = Path(__file__).parent


class Overwriting:
    """Batches in reused `memory`: pageable memory is overwritten at once, pinned memory as early as is allowed."""

    def __init__(self, memory: Sequence[Tensor], count: int = 12) -> None:
        self.memory = memory
        self.count = count
        self.expected: list[Tensor] = []

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for n in range(self.count):
            memory = self.memory[n % len(self.memory)]
            rows = len(memory) - n % 3  # batches of several sizes
            memory.fill_(torch.nan)
            memory[:rows] = torch.randn(memory[:rows].shape)
            self.expected.append(memory[:rows].clone())
            yield memory[:rows], n


def races(streams: Streams, memory: Sequence[Tensor], depth: int, **options: Any) -> list[str]:
    """The races seen by a consumer that drops each batch as soon as its kernels are launched."""
    loader = Overwriting(memory)
    for batch, n in prefetch(loader, streams, depth, **options):
        expected = loader.expected[n]
        streams.use(batch, expected.to(options.get("dtype", expected.dtype)))
        del batch
    streams.drain("consumer")
    return streams.wrong


@pytest.mark.parametrize("pinned", [False, True], ids=["pageable", "pinned"])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("late", LATE.values(), ids=LATE)
@pytest.mark.parametrize("options", [{}, {"cast": "before"}, {"cast": "after"}], ids=["plain", "before", "after"])
def test_memory_that_is_overwritten_as_early_as_allowed(
    late: Sequence[str], depth: int, pinned: bool, options: dict[str, Any]
) -> None:
    streams = Streams(late)
    memory = [torch.empty(7, 3) for _ in range(depth if pinned else 1)]
    if pinned:
        memory = [streams.pin(tensor) for tensor in memory]
    if options:
        options = {**options, "dtype": torch.bfloat16}
    assert races(streams, memory, depth, **options) == []


@given(seed=st.integers(0, 2**32), depth=st.integers(1, 4), pinned=st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_order_of_events_causes_a_race(seed: int, depth: int, pinned: bool) -> None:
    streams = Streams(seed=seed)
    memory = [torch.empty(5, 2) for _ in range(depth)]
    if pinned:
        memory = [streams.pin(tensor) for tensor in memory]
    assert races(streams, memory, depth) == []


class Forgetful(list[Any]):
    def append(self, item: Any) -> None:
        pass


@pytest.mark.parametrize("forgotten", ["wait", "synchronize", "keep"])
def test_the_simulation_detects_a_forgotten_wait(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Streams, forgotten, lambda *_: None)
    assert any(races(Streams(late), [torch.empty(7, 3)], 2) for late in LATE.values())


def test_the_simulation_detects_pinned_memory_reused_too_early() -> None:
    streams = Streams(LATE["late copies"])
    assert races(streams, [streams.pin(torch.empty(7, 3))], 2)


def test_the_simulation_detects_sources_that_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    original = prefetch_module._Slot.__init__

    def forgetful(slot: Any, streams: Any) -> None:
        original(slot, streams)
        slot.sources = Forgetful()

    def fresh(streams: Streams) -> Iterator[Tensor]:
        for _ in range(4):
            yield streams.pin(torch.ones(3))

    def consume(streams: Streams) -> list[str]:
        for batch in prefetch(fresh(streams), streams):
            streams.use(batch, torch.ones(3))
        streams.drain("consumer")
        return streams.wrong

    assert consume(Streams(LATE["both late"])) == []
    monkeypatch.setattr(prefetch_module._Slot, "__init__", forgetful)
    assert consume(Streams(LATE["both late"]))


def test_pinned_memory_is_reused() -> None:
    streams = Streams(LATE["late copies"])
    prefetcher = prefetch([torch.randn(8, 4) for _ in range(50)], streams)
    assert len(list(prefetcher)) == 50
    assert streams.pinned_bytes == 2 * 8 * 4 * 4


def test_sources_outlive_their_copies_after_a_break() -> None:
    streams = Streams(LATE["both late"])
    source = streams.pin(torch.ones(3))
    for _ in prefetch([source, torch.ones(3)], streams):
        break
    assert not streams.queues["side"]


def test_the_cpu_passes_batches_through() -> None:
    loader = [(torch.ones(2), "a"), {"x": torch.zeros(1)}]
    assert all(passed is original for passed, original in zip(DevicePrefetcher(loader, "cpu"), loader, strict=True))


@pytest.mark.parametrize("streams", [None, Streams(LATE["late copies"])], ids=["cpu", "streams"])
@pytest.mark.parametrize("cast", ["before", "after"])
def test_only_floating_point_tensors_are_cast(streams: Streams | None, cast: Any) -> None:
    batch = {"x": torch.rand(3, 2, dtype=torch.float64).t(), "y": torch.arange(3), "z": [torch.ones(2).bfloat16()]}
    (actual,) = prefetch([batch], streams, dtype=torch.bfloat16, cast=cast)
    if streams:
        streams.drain("side")
    assert equal(actual["x"], batch["x"].bfloat16())
    assert actual["x"].stride() == (1, 2)
    assert equal(actual["y"], batch["y"])
    assert equal(actual["z"][0], batch["z"][0])


def test_fewer_bytes_are_staged_if_cast_before() -> None:
    staged = {}
    for cast in ("before", "after"):
        streams = Streams(LATE["late copies"])
        list(prefetch([torch.rand(8)], streams, dtype=torch.float16, cast=cast))
        staged[cast] = streams.pinned_bytes
    assert staged == {"before": 16, "after": 32}


def test_a_batch_on_the_device_is_not_copied() -> None:
    streams = Streams(LATE["late copies"])
    on_device = streams.empty((3,), (1,), torch.float32)
    (actual,) = prefetch([(on_device, 1)], streams)
    assert actual[0] is on_device
    assert streams.pinned_bytes == 0


def test_pinned_memory_is_allocated_outside_of_inference_mode() -> None:
    streams = Streams(LATE["late copies"])
    batches = iter(prefetch([torch.ones(2), torch.ones(2), torch.ones(2)], streams, 1))
    with torch.inference_mode():
        assert not next(batches).is_inference()
    assert len(list(batches)) == 2


class Scripted:
    """An iterator of batches and errors. After an error it continues like DataLoader, or ends like a generator."""

    def __init__(self, script: Sequence[int | type[BaseException]], goes_on: bool) -> None:
        self.script = iter(script)
        self.goes_on = goes_on
        self.given = 0

    def __iter__(self) -> Scripted:
        return self

    def __next__(self) -> Tensor:
        item = next(self.script)
        if isinstance(item, type):
            if not self.goes_on:
                self.script = iter(())
            raise item(f"in the place of batch {self.given}")
        self.given += 1
        return torch.full((2,), float(item))


def outcomes(batches: Iterator[Any], streams: Streams, calls: int) -> list[Any]:
    def outcome() -> Any:
        try:
            batch = next(batches)
            streams.drain("consumer")
            return batch.tolist()
        except (Exception, KeyboardInterrupt) as error:
            return type(error), str(error)

    return [outcome() for _ in range(calls)]


SCRIPTS = st.lists(st.one_of(st.integers(0, 9), st.sampled_from([ValueError, OSError])), max_size=8)


@given(SCRIPTS, st.booleans(), st.integers(1, 4))
@settings(deadline=None)
def test_errors_are_raised_in_the_order_of_batches(script: list[Any], goes_on: bool, depth: int) -> None:
    streams = Streams(LATE["late copies"])
    actual = outcomes(iter(prefetch(Scripted(script, goes_on), streams, depth)), streams, 12)
    assert actual == outcomes(Scripted(script, goes_on), streams, 12)


@given(st.integers(0, 6), st.integers(1, 4))
@settings(deadline=None)
def test_ctrl_c_acts_at_once_and_no_batch_is_lost(place: int, depth: int) -> None:
    streams = Streams(LATE["late copies"])
    script = [*range(place), KeyboardInterrupt, *range(place, 6)]
    loader = Scripted(script, goes_on=True)
    actual = outcomes(iter(prefetch(loader, streams, depth)), streams, 8)
    (interrupted,) = (n for n, outcome in enumerate(actual) if outcome[0] is KeyboardInterrupt)
    assert interrupted == max(0, place - depth)
    del actual[interrupted]
    assert actual[:6] == [[float(n)] * 2 for n in range(6)]


@given(st.integers(1, 4), st.integers(0, 6))
@settings(deadline=None)
def test_never_more_than_depth_batches_ahead(depth: int, taken: int) -> None:
    streams = Streams(LATE["late copies"])
    loader = Scripted(range(10), goes_on=True)
    batches = iter(prefetch(loader, streams, depth))
    assert loader.given == 0
    for n in range(1, taken + 1):
        next(batches)
        assert loader.given == min(n + depth, 10)


def test_an_error_keeps_its_traceback() -> None:
    def loader() -> Iterator[Tensor]:
        yield torch.ones(1)
        raise ValueError("bad row")

    batches = iter(prefetch(loader(), Streams(LATE["late copies"])))
    next(batches)
    with pytest.raises(ValueError, match="bad row") as caught:
        next(batches)
    assert caught.traceback[-1].name == "loader"


def test_a_loader_is_closed_at_once_after_a_break() -> None:
    closed = []

    def loader() -> Iterator[Tensor]:
        try:
            for _ in range(10):
                yield torch.ones(1)
        finally:
            closed.append(True)

    gc.disable()  # reference counts alone must close it, as in a plain loop
    try:
        for _ in prefetch(loader(), Streams(LATE["late copies"])):
            break
        assert closed
    finally:
        gc.enable()


@given(batches=st.lists(st.integers(0, 9), max_size=8), depth=st.integers(1, 4), taken=st.integers(0, 9))
@settings(deadline=None)
def test_after_a_break_the_next_pass_is_complete(batches: list[int], depth: int, taken: int) -> None:
    class Loader:
        opened = closed = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.opened += 1
            try:
                yield from (torch.full((2,), n) for n in batches)
            finally:
                self.closed += 1

    def walk(passes: Any, loader: Loader, streams: Streams) -> list[Any]:
        seen: list[Any] = []
        for count, batch in enumerate(passes):
            if count == taken:
                break
            streams.drain("consumer")
            seen.append(batch.tolist())
        return [*seen, loader.opened, loader.closed]

    streams, ours, plain = Streams(LATE["late copies"]), Loader(), Loader()
    prefetcher = prefetch(ours, streams, depth)
    for _ in range(2):
        assert walk(prefetcher, ours, streams) == walk(plain, plain, streams)
    streams.drain("side")
    assert len(list(prefetcher)) == len(batches)


def test_iter_starts_the_pass() -> None:
    class Broken:
        def __iter__(self) -> Iterator[Any]:
            raise OSError("no such folder")

    with pytest.raises(OSError, match="no such folder"):
        iter(prefetch(Broken(), Streams()))


def test_two_passes_at_once() -> None:
    streams = Streams(LATE["late copies"])
    prefetcher = prefetch([torch.full((2,), float(n)) for n in range(6)], streams)
    pairs = []
    for a, b in zip(prefetcher, prefetcher, strict=True):
        streams.drain("consumer")
        pairs.append((a[0].item(), b[0].item()))
    assert pairs == [(float(n), float(n)) for n in range(6)]


def test_length_is_the_loaders() -> None:
    assert len(DevicePrefetcher([1, 2, 3], "cpu")) == 3
    generator = (n for n in range(3))
    with pytest.raises(TypeError) as plain:
        len(generator)  # type: ignore[arg-type]
    with pytest.raises(TypeError) as ours:
        len(DevicePrefetcher(generator, "cpu"))
    assert str(ours.value) == str(plain.value)
    assert list(DevicePrefetcher(generator, "cpu")) == [0, 1, 2]
    assert list(DevicePrefetcher(generator, "cpu")) == []


class Dying(Dataset[Tensor]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Tensor:
        if index == 20:
            time.sleep(0.5)  # earlier batches are passed on meanwhile, through a connection to this process
            os._exit(1)
        return torch.full((2,), float(index))


def watch_a_worker_die(wrap: Callable[..., Any]) -> None:
    """Print the first number of each batch, and the errors raised in place of the others."""
    streams = Streams(LATE["late copies"])
    try:
        for batch in wrap(DataLoader(Dying(), batch_size=4, num_workers=1), streams):
            streams.drain("consumer")
            print(int(batch[0, 0]))
    except RuntimeError as error:
        print(error, flush=True)
        os._exit(0)  # the signal handler may raise again while the process ends


@pytest.mark.alone
@pytest.mark.parametrize("wrap", ["lambda loader, streams: loader", "tests.prefetch"], ids=["plain", "prefetched"])
def test_a_dead_worker_raises_after_earlier_batches(wrap: str) -> None:
    """Run it in a new process, because DataLoader's signal handler may raise anywhere, in pytest too."""
    script = f"import test_prefetch as tests; tests.watch_a_worker_die({wrap})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    child = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    *seen, error = child.stdout.splitlines()
    assert "exited unexpectedly" in error
    assert seen == [str(4 * n) for n in range(len(seen))]


LOADER_ATTRIBUTES = ("dataset", "sampler", "batch_size", "batch_sampler")


@pytest.mark.parametrize("name", LOADER_ATTRIBUTES)
def test_loader_attributes_are_passed_through(name: str) -> None:
    loader = DataLoader(TensorDataset(torch.arange(6)), batch_size=2, shuffle=True)
    prefetcher = DevicePrefetcher(loader, "cpu", np.int64(3))
    assert (type(prefetcher.depth), prefetcher.depth) == (int, 3)
    assert getattr(prefetcher, name) is getattr(loader, name)
    assert getattr(DevicePrefetcher(prefetcher, "cpu"), name) is getattr(loader, name)
    without = DevicePrefetcher([torch.ones(2)], "cpu")
    assert not hasattr(without, name)
    with pytest.raises(AttributeError, match=f"^the loader is of type list and has no {name}, which a DataLoader has$"):
        getattr(without, name)


@pytest.mark.parametrize("late", LATE.values(), ids=LATE)
@pytest.mark.parametrize("streams", [False, True], ids=["cpu", "streams"])
def test_next_works_as_on_a_dataloader_iterator(streams: bool, late: Sequence[str]) -> None:
    loader = DataLoader(TensorDataset(torch.arange(6)), batch_size=2)
    prefetcher = prefetch(loader, Streams(late) if streams else None)
    for iterable in (loader, prefetcher):
        iterator = iter(iterable)
        assert iter(iterator) is iterator
        taken = [next(iterator) for _ in range(3)]
        if streams and iterable is prefetcher:
            prefetcher._streams.drain("consumer")
        assert [batch.tolist() for (batch,) in taken] == [[0, 1], [2, 3], [4, 5]]
        for _ in range(2):
            with pytest.raises(StopIteration):
                next(iterator)
        with pytest.raises(TypeError, match="object is not an iterator$"):
            next(iterable)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "sentence"),
    [
        ((3, "cpu"), {}, TypeError, "loader is of type int; it needs to be an iterable of batches"),
        (([], "cpu", 0), {}, ValueError, "depth is 0; it needs to be 1 or more"),
        (([], "cpu", 1.5), {}, TypeError, "depth is 1.5; it needs to be an integer, 1 or more"),
        (([], "cpu", torch.tensor(True)), {}, TypeError, r"depth is tensor\(True\); it needs to be an integer"),
        (([], "cpu"), {"dtype": "bf16"}, TypeError, "dtype is 'bf16'; it needs to be a torch.dtype"),
        (([], "cpu"), {"dtype": torch.int8}, ValueError, "dtype is torch.int8; it needs to be a floating-point dtype"),
        (([], "cpu"), {"cast": "never"}, ValueError, "cast is 'never'; it needs to be one of 'before', 'after'"),
        (([], "gpu"), {}, ValueError, "device is 'gpu'; it needs to be one that torch has here"),
        (([], None), {}, ValueError, "device is None; it needs to be one that torch has here"),
    ],
    ids=["loader", "depth", "depth's type", "depth's bool", "dtype's type", "dtype", "cast", "no device", "None"],
)
def test_wrong_arguments_are_refused(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        DevicePrefetcher(*arguments, **options)


def test_passes_share_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.SimpleNamespace(
        Stream=lambda device: object(), is_available=lambda: True, current_device=lambda: 1, device_count=lambda: 2
    )
    monkeypatch.setattr(torch, "cuda", module)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    prefetch_module._streams.cache_clear()
    passes = [iter(DevicePrefetcher([], "cuda")) for _ in range(2)]
    prefetch_module._streams.cache_clear()
    assert passes[0]._streams is passes[1]._streams  # type: ignore[attr-defined]
    assert passes[0]._streams.device == torch.device("cuda:1")  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="device is cuda:2; it needs an index below 2"):
        DevicePrefetcher([], "cuda:2")


def test_cuda_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is cuda, but torch .* finds no cuda device; use cpu"):
        DevicePrefetcher([], "cuda")


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="torch finds an mps device")
def test_a_device_without_streams_that_is_not_here() -> None:
    with pytest.raises(ValueError, match="device is mps, but torch .* finds no mps device; use cpu"):
        DevicePrefetcher([], "mps")


@pytest.mark.gpu
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("pinned", [False, True], ids=["pageable", "pinned"])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_every_byte_arrives_on_a_real_gpu(depth: int, pinned: bool) -> None:
    """Overwrite memory as early as allowed, keep the device late, and drop every batch at once."""
    count, shape = 60, (1 << 20) + 7
    batches = [torch.randint(0, 255, (shape - n % 5,), dtype=torch.uint8) for n in range(count)]
    memory = [torch.empty(shape, dtype=torch.uint8, pin_memory=pinned) for _ in range(depth if pinned else 1)]

    def loader() -> Iterator[tuple[Tensor, int]]:
        for n, values in enumerate(batches):
            target = memory[n % len(memory)]
            target.fill_(0xAA)
            target[: len(values)] = values
            yield target[: len(values)], n

    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    expected = [values.cuda() for values in batches]
    for batch, n in DevicePrefetcher(loader(), "cuda", depth):
        torch.cuda._sleep(2_000_000)
        wrong += (batch != expected[n]).sum()
        del batch
    assert wrong.item() == 0


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("pinned", [False, True], ids=["pageable", "pinned"])
@pytest.mark.parametrize("share", [0.5, 2.0], ids=["compute-bound", "copy-bound"])
def test_copies_hide_behind_compute(share: float, pinned: bool) -> None:
    """Throughput is at least 0.95 of the limit.

    With pinned batches, the limit is the slower of copy and compute. With pageable ones, it is the slowest of copy,
    compute and the host's copy into pinned memory.
    """
    nbytes, steps = 64 << 20, 40
    batches = [torch.randint(0, 255, (nbytes,), dtype=torch.uint8) for _ in range(4)]
    if pinned:
        batches = [batch.pin_memory() for batch in batches]
    target, staging = torch.empty(nbytes, dtype=torch.uint8, device="cuda"), torch.empty_like(batches[0]).pin_memory()
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def clock(call: Callable[[], object], rounds: int = 20) -> float:
        call()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(rounds):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - begun) / rounds

    copied = clock(lambda: target.copy_(staging, non_blocking=True))
    staged = 0.0 if pinned else clock(lambda: staging.copy_(batches[0]))
    products = max(1, round(copied / share / clock(lambda: a @ a)))

    def compute() -> None:
        for _ in range(products):
            a @ a

    computed = clock(compute)
    for _ in range(2):  # the first pass allocates its memory
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in DevicePrefetcher((batches[n % 4] for n in range(steps)), "cuda"):
            compute()
        torch.cuda.synchronize()
        took = (time.perf_counter() - begun) / steps
    assert max(copied, computed, staged) / took >= 0.95
