"""Replayed launches: they pass the arguments that Triton would, use the right key, and compile and prepare once.

The arguments of a compiled kernel can be checked without a GPU. Under a stand-in for Triton's driver, everything
compiles for a real target and nothing is launched. This happens in a separate process that runs this file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import pytest
import torch
from launch_inputs import BF16, GELU, IDENTITY, RELU, SILU, gradients
from torch import Tensor

from mlp_fused import reference
from mlp_fused.engine import autograd, tables
from mlp_fused.engine.autograd import run_layers, run_network
from mlp_fused.engine.network_path import NetworkPath
from mlp_fused.engine.paths import find_layers, find_network
from mlp_fused.engine.schedule import LaunchSequence
from mlp_fused.kernels import (
    devices,
    launch,
    layer_tiles,
    network,
    network_forward,
    network_tiles,
    tile_config,
)
from mlp_fused.kernels.layer_backward import dgrad, output_gradient, wgrad_products, wgrad_sums
from mlp_fused.kernels.layer_forward import layer_forward
from mlp_fused.kernels.partial_sums import sum_partials
from mlp_fused.reference import Layer


class StandIn:
    """A driver for Triton that compiles for a target and records the launcher's arguments instead of launching."""

    def __init__(self, backend: str, arch: int | str, warp_size: int, device: int) -> None:
        from triton.backends.compiler import GPUTarget

        if backend == "cuda":
            import triton.backends.nvidia.driver as vendor
        else:
            import triton.backends.amd.driver as vendor
        nothing = types.SimpleNamespace(launch=lambda *arguments: None)
        for name, value in {  # values that a real launcher gets from a compiler or a GPU
            "annotate_arguments": list,
            "library_dirs": list,
            "_get_path_to_hip_runtime_dylib": str,
            "make_launcher": lambda *arguments: "",
            "compile_module_from_src": lambda **arguments: nothing,
        }.items():
            if hasattr(vendor, name):
                setattr(vendor, name, value)
        self.device, self.calls, stand_in = device, [], self

        class Launcher(vendor.CudaLauncher if backend == "cuda" else vendor.HIPLauncher):
            def __call__(self, *arguments: Any) -> None:
                stand_in.calls.append(
                    {
                        "grid": arguments[:3],
                        "stream": arguments[3],
                        "function": arguments[4],
                        "metadata": plain(arguments[5]),
                        "hook metadata": arguments[7] is not None,
                        "arguments": plain(arguments[9:]),
                    }
                )
                super().__call__(*arguments)

        self.launcher_cls = Launcher
        self.utils = types.SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (object(), hash(kernel), 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            build_signature_metadata=list,
            launch=nothing.launch,
        )
        self.get_current_target = lambda: GPUTarget(backend, arch, warp_size)
        self.get_current_device = lambda: self.device
        self.get_current_stream = lambda device: 70 + device

    @contextlib.contextmanager
    def on(self, device: int) -> Iterator[None]:
        """Replace torch.cuda.device."""
        before, self.device = self.device, device
        yield
        self.device = before

    def noted(self, call: Callable[..., Any], *arguments: Any) -> list[dict[str, Any]]:
        """Run a call and return its launches."""
        self.calls.clear()
        assert call(*arguments) is not False
        return list(self.calls)


def plain(value: Any) -> Any:
    """A launcher's argument for comparison: tensors as pointers, objects by identity."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, tuple | list):
        return [plain(element) for element in value]
    return value if value is None or isinstance(value, int | float | str) else f"{type(value).__name__} {id(value)}"


def draw(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, dtype=torch.float32).to(dtype)


def scenarios() -> dict[str, tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]]:
    """For each kind of launch, a function that launches on tensors and one that makes the tensors."""
    M, N, K = 500, 64, 48
    hopper = devices.DEVICES["NVIDIA H100"]
    tile = layer_tiles.choose(tile_config.Problem("wgrad", N, K, M, BF16), hopper)
    whole, split = (dataclasses.replace(tile, split=parts) for parts in (1, 4))
    partial = wgrad_sums(M, split, BF16, N * K, N)
    widths, strides = (K, 32, 16), ((K, 1, 1), (32, 1, 0))
    net = network.make_network(widths, strides, (RELU, IDENTITY), BF16, "ieee")
    problem = network_tiles.NetworkProblem("forward", net.pads, net.saves_z, BF16)
    net_tile = network_tiles.network_tile(problem, hopper)
    assert not isinstance(net_tile, str)
    return {
        "forward": (
            lambda *tensors: layer_forward(*tensors, GELU, "ieee"),
            lambda: (draw(M, K), draw(N, K), draw(N), draw(M, N), draw(M, N)),
        ),
        "forward of odd widths, without bias": (
            lambda *tensors: layer_forward(*tensors, RELU, "ieee"),
            lambda: (draw(M, 19), draw(N, 19), None, draw(M, N), None),
        ),
        "dgrad": (
            lambda *tensors: dgrad(*tensors, GELU, "ieee"),
            lambda: (draw(M, N), draw(N, K), draw(M, K), draw(M, K), draw(M, K)),
        ),
        "dgrad of the first layer": (
            lambda *tensors: dgrad(*tensors, IDENTITY, "ieee"),
            lambda: (draw(M, N), draw(N, K), None, draw(M, K), None),
        ),
        "wgrad": (
            lambda *tensors: wgrad_products(*tensors, K, whole, wgrad_sums(M, whole, BF16, N * K, N)),
            lambda: (draw(M, N), draw(M, K), draw(N, K), draw(N, dtype=torch.float32)),
        ),
        "split wgrad": (
            lambda *tensors: wgrad_products(*tensors, K, split, partial),
            lambda: (draw(M, N), draw(M, K), *partial.allocate(torch.device("cpu"))[1:]),
        ),
        "sum_partials": (
            sum_partials,
            lambda: (draw(7, 33, dtype=torch.float32), (draw(4, 8), draw(1))),
        ),
        "output_gradient": (
            lambda dh, saved, dz, h: output_gradient(dh, saved, dz, GELU, None, h),
            lambda: (draw(1, 1).expand(M, N), draw(M, N), draw(M, N), None),
        ),
        "network forward": (
            lambda x, y, ws, bs, kept, z, h: network_forward.network_forward(
                x, ws, bs, y, net, net_tile, kept=kept, z=z, h=h
            ),
            lambda: (
                draw(M, K), draw(M, 16), (draw(32, K), draw(16, 32)), (draw(32), None), draw(M * 32), None, None,
            ),
        ),
    }  # fmt: skip


def run_on_stand_ins() -> dict[str, Any]:
    """Run everything under stand-ins and return the results for the tests."""
    from triton.runtime import JITFunction, _allocation
    from triton.runtime.driver import driver

    hopper = StandIn("cuda", 90, 32, 0)
    driver.set_active(hopper)
    torch.cuda.current_device = lambda: driver.active.device
    torch.cuda.device = lambda device: driver.active.on(device)
    devices.device_record = lambda tensor: dataclasses.replace(devices.DEVICES["NVIDIA H100"], name="a stand-in")
    tables.PACKAGED = Path("none")
    counts = Counter()  # of launches through Triton and of compilations
    scratch: list[int] = []

    def wrap(owner: Any, name: str, after: Callable[..., None]) -> None:
        inner = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            result = inner(*arguments, **options)
            after(*arguments)
            return result

        setattr(owner, name, wrapped)

    wrap(launch.Launch, "__init__", lambda self, *arguments: setattr(self, "index", driver.active.device))
    wrap(launch.Launch, "allocate", lambda self, size, *arguments: scratch.append(size))
    wrap(JITFunction, "run", lambda self, *arguments: counts.update(["launches"]))
    wrap(JITFunction, "_do_compile", lambda self, *arguments: counts.update([self.__name__]))
    results: dict[str, Any] = {"launches": {}}

    def users_own(size: int, alignment: int, stream: int | None) -> Tensor:
        raise AssertionError("the user's own allocator was asked")

    _allocation._allocator.set(users_own)
    launched: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    for name, (call, tensors) in scenarios().items():
        prepared, others = call(*tensors()), tensors()
        by_triton, asked = hopper.noted(call, *others), scratch[:]
        scratch.clear()
        before = counts["launches"]
        replayed = hopper.noted(replay, prepared, *others)
        launched[name] = prepared, others
        results["launches"][name] = {
            "by Triton": by_triton,
            "replayed": replayed,
            "through Triton": counts["launches"] - before,
            "scratch": (asked[len(asked) // 2 :], scratch[:]),  # the first half was for `prepared`
        }
        scratch.clear()
    results["the user's allocator is back"] = _allocation._allocator.get() is users_own

    prepared, tensors = launched["forward"]
    with hopper.on(1), launch.count_launches() as counted:
        results["from another device"] = hopper.noted(replay, prepared, *tensors), hopper.device, counted

    views = [draw(tensor.numel() + 1)[1:].view(tensor.shape) for tensor in tensors]
    call, _ = scenarios()["forward"]
    unaligned_launches = [call(*tensors[:at], views[at], *tensors[at + 1 :]) for at in range(len(tensors))]
    results["misaligned"] = [result is not None for result in unaligned_launches]

    def in_a_thread(seed: int) -> None:
        own = scenarios()["forward"][1]()
        for _ in range(50):
            replay(prepared, *own)

    hopper.calls.clear()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(in_a_thread, range(4)))
    results["threads"] = sorted(Counter(str(call["arguments"]) for call in hopper.calls).values())

    results["steps"] = {path: steps(path, counts) for path in ("layer", "run", "network")}
    results["launcher calls"] = launcher_calls(hopper, counts)

    amd = StandIn("hip", "gfx942", 64, 2)  # another device, with its own compiled kernels
    driver.set_active(amd)
    call, tensors = scenarios()["sum_partials"]
    prepared, others = call(*tensors()), tensors()
    results["AMD"] = {"by Triton": amd.noted(call, *others), "replayed": amd.noted(replay, prepared, *others)}
    return results


def steps(path: str, counts: Counter[str]) -> list[dict[str, Any]]:
    """Train with several batch sizes. Returns for each step its compilations and its launches through Triton."""
    widths = (32, 16, 16) if path == "network" else (64, 48, 32)
    weights = [draw(n, k).requires_grad_() for k, n in itertools.pairwise(widths)]
    biases = [draw(n).requires_grad_() for n in widths[1:]]
    activations = (SILU, GELU) if path == "run" else (GELU, SILU)  # no other path has compiled these kernels
    layers = [Layer(*layer) for layer in zip(weights, biases, activations)]
    results = []
    for rows in (4000, 3999, 4001, 3993, 4000):
        before = Counter(counts)
        x = draw(rows, widths[0])
        if path == "layer":
            bound, autograd.LAUNCH_BOUND = autograd.LAUNCH_BOUND, -1
            y = run_layers(x, weights, biases, find_layers(x, layers, BF16, "triton"))
            autograd.LAUNCH_BOUND = bound
        elif path == "run":
            y = run_layers(x, weights, biases, find_layers(x, layers, BF16, "triton"))
        else:
            network_path = find_network(x, layers, BF16)
            assert isinstance(network_path, NetworkPath)
            y = run_network(x, tuple(weights), tuple(biases), network_path)
        forward = counts["launches"] - before["launches"]
        y.backward(torch.ones_like(y))
        compiled = counts - before
        launched = compiled.pop("launches", 0)
        results.append({"rows": rows, "compiled": compiled, "forward": forward, "backward": launched - forward})
    return results


def replay(prepared: launch.Launch, *tensors: Any) -> None:
    """Replay a launch like a schedule does."""

    def pointers(operand: Any) -> Any:
        if isinstance(operand, tuple):
            return tuple(map(pointers, operand))
        return None if operand is None else operand.data_ptr()

    LaunchSequence([(prepared, range(len(tensors)))])(tensors, [*map(pointers, tensors)])


def launcher_calls(hopper: StandIn, counts: Counter[str]) -> dict[str, Any]:
    """The calls of the launcher in a step of all layers at once, kernel by kernel and then as one program.

    Also counts the launches of a step that go through Triton while hooks are set, and afterwards.
    """
    weights = [draw(n, k).requires_grad_() for k, n in ((64, 49), (49, 32))]
    biases = [draw(49).requires_grad_(), None]
    layers = [Layer(*layer) for layer in zip(weights, biases, (GELU, SILU))]
    x = draw(4000, 64).requires_grad_()

    def step() -> None:
        y = run_layers(x, weights, biases, find_layers(x, layers, BF16, "triton"))
        y.backward(torch.ones_like(y))

    results: dict[str, Any] = {
        "one by one": hopper.noted(step),
        "as a program": hopper.noted(step),
        "through Triton": {},
    }
    runtime = sys.modules["triton"].knobs.runtime
    for when in ("enter", "exit", "never"):
        hook = getattr(runtime, f"launch_{when}_hook", None)
        if hook is not None:
            hook.add(print)
        before = counts["launches"]
        step()
        results["through Triton"][when] = counts["launches"] - before
        if hook is not None:
            hook.remove(print)
    return results


if __name__ == "__main__":
    json.dump(run_on_stand_ins(), sys.stdout)
    sys.exit()


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """The results of the process with stand-ins."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**inherited, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.alone
@pytest.mark.parametrize("name", scenarios())
def test_a_replayed_launch_passes_the_arguments_of_triton(name: str, results: dict[str, Any]) -> None:
    launched = results["launches"][name]
    assert launched["through Triton"] == 0
    by_triton, replayed = launched["by Triton"], launched["replayed"]
    assert len(by_triton) == len(replayed) == 1
    for ours, theirs in zip(replayed, by_triton):
        assert not ours.pop("hook metadata")
        theirs.pop("hook metadata")
        assert ours == theirs
        assert ours["stream"] == 70
    by_triton, replayed = launched["scratch"]
    assert by_triton == replayed
    assert results["launches"]["forward"]["scratch"][1]  # scratch memory for descriptors


@pytest.mark.alone
def test_the_users_scratch_allocator_is_restored(results: dict[str, Any]) -> None:
    assert results["the user's allocator is back"]


@pytest.mark.alone
def test_launch_hooks_fire_on_every_launch(results: dict[str, Any]) -> None:
    count = len(results["launcher calls"]["one by one"])
    assert results["launcher calls"]["through Triton"] == {"enter": count, "exit": count, "never": 0}


@pytest.mark.alone
def test_a_launch_runs_on_its_tensors_device(results: dict[str, Any]) -> None:
    (launched,), device, counted = results["from another device"]
    assert launched["stream"] == 70
    assert counted == {"layer_forward_kernel": 1}
    assert device == 1  # the current device is restored


@pytest.mark.alone
def test_a_tensor_that_is_not_aligned_is_refused(results: dict[str, Any]) -> None:
    assert results["misaligned"] == [False] * 5  # no launch is replayed with them


@pytest.mark.alone
def test_threads_pass_their_own_pointers(results: dict[str, Any]) -> None:
    assert results["threads"] == [50] * 4


@pytest.mark.alone
def test_a_launch_is_replayed_on_amd(results: dict[str, Any]) -> None:
    (ours,), (theirs,) = results["AMD"]["replayed"], results["AMD"]["by Triton"]
    assert {**ours, "hook metadata": True} == {**theirs, "hook metadata": True}


@pytest.mark.alone
@pytest.mark.parametrize("path", ["layer", "run", "network"])
def test_another_number_of_rows_compiles_nothing(path: str, results: dict[str, Any]) -> None:
    first, *others, last = results["steps"][path]
    assert len(first["compiled"]) >= 3
    assert [step["compiled"] for step in others] == [{}] * len(others), others
    assert all(step["forward"] for step in others)
    assert last["forward"] == last["backward"] == 0  # the launches were prepared before


@pytest.mark.alone
def test_a_program_passes_the_arguments_of_its_launches(results: dict[str, Any]) -> None:
    """Pointers differ, because memory is allocated differently. The table of cases tests them."""

    def but_for_pointers(value: Any) -> Any:
        if isinstance(value, list):
            return list(map(but_for_pointers, value))
        return "pointer" if isinstance(value, int) and value > 2**40 else value

    one_by_one, as_program = results["launcher calls"]["one by one"], results["launcher calls"]["as a program"]
    assert len(one_by_one) == len(as_program) >= 2 + 1 + 2 + 2 + 1  # at least one weight gradient is split
    assert any(call["hook metadata"] for call in one_by_one)
    for ours, theirs in zip(as_program, one_by_one):
        assert not ours.pop("hook metadata")
        theirs.pop("hook metadata")
        assert but_for_pointers(list(ours.values())) == but_for_pointers(list(theirs.values()))


class Kernel:
    """A kernel whose launches through Triton last until `done`. It counts the launches that are running."""

    __name__ = "kernel"
    params = ()

    def __init__(self) -> None:
        self.begun, self.done = Event(), Event()
        self.running = self.most = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.run

    def run(self, *arguments: Any, **constants: Any) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        self.begun.set()
        self.done.wait(10)
        self.running -= 1


def make_launch(kernel: Any) -> launch.Launch:
    return launch.Launch(kernel, 1, torch.device("cpu"), tile_config.TileConfig(16, 16), (), {})


def test_first_launches_do_not_overlap() -> None:
    """Triton loads a compiled kernel at its first launch, which two threads must not do at once."""
    kernel = Kernel()
    with ThreadPoolExecutor(2) as pool:
        launched = [pool.submit(make_launch(kernel).through_triton, [torch.zeros(4)]) for _ in range(2)]
        assert kernel.begun.wait(10)
        time.sleep(0.1)  # time for the second launch to begin
        kernel.done.set()
        for future in launched:
            future.result()
    assert kernel.most == 1


def test_replays_wait_neither_for_a_first_launch_nor_for_each_other() -> None:
    kernel, together = Kernel(), Barrier(2)
    x = torch.zeros(4)

    def replay(_: int) -> None:
        prepared = make_launch(kernel)
        prepared.run = lambda *arguments: together.wait(10)  # raises unless the other replay waits here too
        LaunchSequence([(prepared, (0,))])([x], [x.data_ptr()])

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(make_launch(kernel).through_triton, [x])
        assert kernel.begun.wait(10)
        list(pool.map(replay, range(2)))
        assert not first.done()
        kernel.done.set()
        first.result()


def test_a_forward_in_the_backward_reads_the_strides_that_hooks_gave_a_weight(device: str) -> None:
    """torch.autograd.graph.saved_tensors_hooks may change a weight's layout between forward and backward."""
    weights = [(torch.randn(n, k, device=device) / 4).requires_grad_() for k, n in ((20, 16), (16, 16))]
    x = torch.randn(23, 20, device=device)
    layers = [Layer(weight, None, activation) for weight, activation in zip(weights, (GELU, IDENTITY))]
    path = find_network(x, layers, torch.float32)
    assert isinstance(path, NetworkPath)
    path = dataclasses.replace(path, formulation="rerun")
    expected = gradients(reference.mlp(x, weights, [None] * 2, [GELU, IDENTITY]), weights)

    def transposed(tensor: Tensor) -> Tensor:
        return tensor if tensor.shape == x.shape else tensor.t().contiguous().t()

    for unpack in (lambda tensor: tensor, transposed):
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            results = gradients(run_network(x, tuple(weights), (None, None), path), weights)
        for ours, theirs in zip(results, expected):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_backward_reads_the_strides_that_hooks_gave_a_bias(device: str) -> None:
    """The first backward of the test sees a contiguous bias, and the second one a strided bias."""
    weights = [(torch.randn(n, k, device=device) / 4).requires_grad_() for k, n in ((20, 16), (16, 16))]
    biases = [torch.randn(16, device=device).requires_grad_() for _ in range(2)]
    x = torch.randn(23, 20, device=device)
    layers = [Layer(*layer) for layer in zip(weights, biases, (GELU, IDENTITY))]
    path = find_network(x, layers, torch.float32, recompute=True)
    assert isinstance(path, NetworkPath)
    expected = gradients(reference.mlp(x, weights, biases, [GELU, IDENTITY]), [*weights, *biases])

    def spread(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor], dim=1).flatten()[::2] if tensor.dim() == 1 else tensor

    for unpack in (lambda tensor: tensor, spread):
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            results = gradients(run_network(x, weights, biases, path), [*weights, *biases])
        for ours, theirs in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
