"""What goes wrong while a network runs: out of memory, NaN under MLP_FUSED_DEBUG, a failing kernel, leaks."""

from __future__ import annotations

import dataclasses
import gc
import os
import re
import subprocess
import sys
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mlp_fused import FusedMLP, fuse, memory
from mlp_fused.__main__ import main
from mlp_fused.checkpoint import load_checkpoint
from mlp_fused.engine import layer_path
from mlp_fused.environment import SWITCHES
from mlp_fused.kernels import activations
from mlp_fused.memory import Need, Room
from mlp_fused.train import loop
from mlp_fused.train.config import Config, build_model
from mlp_fused.train.loop import train

ROOT = Path(__file__).parent.parent
TORCHS = "CUDA out of memory. Tried to allocate 2.00 GiB."
CPU = torch.device("cpu")


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A device with 3 MiB, of which 1 MiB is taken, and no memory for the kernels' outputs."""

    new_empty = torch.Tensor.new_empty

    def refuse(like: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        if like.is_meta:  # torch's own, for what only has a shape
            return new_empty(like, *arguments, **keywords)
        raise torch.OutOfMemoryError(TORCHS)

    monkeypatch.setattr(torch.Tensor, "new_empty", refuse)
    monkeypatch.setattr(memory, "room", lambda device: Room(3 * 2**20, 2**20))
    return monkeypatch


def model_of(**settings: Any) -> FusedMLP:
    return FusedMLP(32, [64, 64, 8], activation_layer="gelu", backend="triton", **settings)


def test_a_forward_that_runs_out_says_what_is_kept_and_what_would_fit(full: pytest.MonkeyPatch, path: str) -> None:
    model, x = model_of(recompute=False), torch.randn(4096, 32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(torch.OutOfMemoryError) as caught:
        model(x)
    text = str(caught.value)
    kept = model.explain(4096).kept_bytes
    assert kept == 4096 * (32 + 64 + 64) * 4
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    # A row: what is kept, and four tensors as wide as the widest layer; gradients and Adam's two tensors are as large
    # as the parameters.
    fits = (3 * 2**20 - 4 * parameters) / (kept / 4096 + 4 * 64 * 4)
    assert text.startswith(
        f"{TORCHS}\nmlp_fused: for 4096 rows the network keeps {kept / 2**20:.1f} MiB for backward and works with "
        f"about 4.0 MiB more, beside {4 * parameters / 2**20:.1f} MiB of parameters, gradients and an optimizer's "
        "state (2 tensors a parameter). Of cpu this process can have 3.0 MiB; its tensors take 1.0 MiB."
    )
    assert 1024 <= fits < 2048
    assert "About 1024 rows would fit. Less is taken by fewer rows at once, recompute=True, 16 bits (t" in text
    assert text.endswith("torch.inference_mode() where no backward follows.")
    assert type(caught.value) is torch.OutOfMemoryError
    assert traceback.extract_tb(caught.tb)[-1].name == "refuse"
    full.undo()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(model(x), nn.Sequential(*model)(x))


@pytest.mark.usefixtures("full")
def test_what_takes_less_is_what_is_not_done_already() -> None:
    def said(model: FusedMLP, dtype: torch.dtype = torch.float32) -> str:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            model(torch.randn(2, 64, 32, dtype=dtype))
        return str(caught.value).partition("mlp_fused: ")[2]

    with torch.inference_mode():
        kept_nothing = said(model_of(dtype=torch.bfloat16), torch.bfloat16)
    assert kept_nothing.startswith("for 128 rows the network keeps nothing for backward and works with about 0.1 MiB")
    assert "of parameters. Of cpu" in kept_nothing
    assert kept_nothing.endswith(
        "By this count the batch fits: what is free may be in pieces. Less is taken by fewer rows at once."
    )
    assert "recompute" not in said(model_of(recompute=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" not in said(model_of())


@pytest.mark.usefixtures("full")
def test_a_network_within_a_network_is_explained_once() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(32, 64), nn.ReLU()), nn.LayerNorm(64), nn.Linear(64, 8), nn.ReLU())
    fuse(model, backend="triton")
    with pytest.raises(torch.OutOfMemoryError) as caught:
        model(torch.randn(16, 32))
    assert str(caught.value).count("mlp_fused: ") == 1
    assert f"beside {16 * sum(each.numel() for each in model.parameters()) / 2**20:.1f} MiB of" in str(caught.value)


@pytest.mark.usefixtures("full")
def test_a_network_that_cannot_be_explained_leaves_torchs_error() -> None:
    model = FusedMLP.from_sequential(nn.Sequential(nn.Unflatten(1, (1, 8, 4)), nn.Flatten(), nn.Linear(32, 2)))
    model.append(nn.Bilinear(2, 2, 2))  # of two inputs
    model.backend = "triton"
    with pytest.raises(torch.OutOfMemoryError) as caught:
        model(torch.randn(4, 32))
    assert str(caught.value) == TORCHS


# Of a GiB: what is taken, what is taken whatever the batch, and how many rows of 2 MiB, half of it kept, would fit.
FITS: dict[str, tuple[dict[str, Any], int | None]] = {
    "all of it": ({}, 512),
    "a part of the step is there already": ({"room": Room(2**30, 2**28)}, 512),
    "others hold half": ({"room": Room(2**30, 2**29 + 2**31)}, 256),
    "parameters": ({"fixed": 2**30 - 3 * 2**21}, 2),
    "not one row": ({"fixed": 2**30}, 0),
    "not known": ({"room": None}, None),
    "no rows": ({"rows": 0}, None),
}


@pytest.mark.parametrize(("changes", "fits"), FITS.values(), ids=FITS)
def test_which_batch_fits(changes: dict[str, Any], fits: int | None) -> None:
    step = {"rows": 1024, "kept": 2**30, "working": 2**30, "fixed": 0, "device": CPU, "room": Room(2**30, 0)}
    need = Need(**{**step, **changes})
    assert need.fits == fits
    ends = {0: "Not even one row would fit.", 2: "About 2 rows would fit.", 512: "About 512 rows would fit."}
    assert ("would fit" in str(need)) == (fits is not None)
    assert str(need).endswith(ends.get(fits, ".") if fits is not None else ".")


def test_the_room_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free memory and what torch keeps in reserve; no more than the process is allowed."""
    assert memory.room(CPU) is None
    for name, value in {
        "mem_get_info": (20, 100),
        "memory_reserved": 30,
        "memory_allocated": 10,
        "get_per_process_memory_fraction": 1.0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.room(torch.device("cuda")) == Room(50, 10)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.25)
    assert memory.room(torch.device("cuda")) == Room(25, 10)


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_gpu_that_runs_out(device: str, backend: Any) -> None:
    """A GiB: the batch that is said to fit does, for a whole step."""
    model = FusedMLP(256, [2048] * 6, activation_layer="gelu", backend=backend, device=device)
    optimizer = torch.optim.Adam(model.parameters())
    rows = 2**15
    torch.cuda.empty_cache()
    allowed = torch.cuda.get_per_process_memory_fraction()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**30) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match=f"mlp_fused: for {rows} rows the network keeps") as caught:
            model(torch.randn(rows, 256, device=device))
        fits = int(re.search(r"About (\d+) rows would fit", str(caught.value))[1])
        assert 256 <= fits < rows
        del caught  # whose traceback holds what the forward had made
        gc.collect()
        torch.cuda.empty_cache()
        model(torch.randn(fits, 256, device=device)).square().mean().backward()
        optimizer.step()
    finally:
        torch.cuda.set_per_process_memory_fraction(allowed)


@pytest.fixture
def run(tmp_path: Path) -> Config:
    """56 rows to train on, 4 steps an epoch, and 14 to validate in one."""
    random = np.random.default_rng(0)
    y = random.integers(0, 3, 70)
    np.savez(tmp_path / "data.npz", x=random.normal(size=(70, 6)) + 2 * y[:, None], y=y)
    return Config(
        data=str(tmp_path / "data.npz"),
        hidden=(8,),
        epochs=3,
        batch_size=16,
        checkpoint=str(tmp_path / "run.pt"),
        device="cpu",
    )


def run_out(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError(TORCHS)


def at(call: int, then: Callable[..., object] = run_out) -> Callable[..., None]:
    """A hook that runs out of memory in its nth call."""
    left = [call]

    def hook(*_: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            then()

    return hook


# Where a step of the second epoch runs out: what to do with the network that is built.
PHASES: dict[str, Callable[[nn.Module], object]] = {
    "forward": lambda model: model.register_forward_hook(at(7)),  # an epoch calls the network 4 + 1 times
    "backward": lambda model: model[0].weight.register_hook(at(6)),
    "optimizer": lambda model: model[0].weight.register_post_accumulate_grad_hook(at(6)),
    "validation": lambda model: model.register_forward_hook(at(10)),
}


@pytest.mark.parametrize("phase", PHASES)
def test_training_that_runs_out_keeps_the_last_checkpoint_and_goes_on_from_it(
    phase: str, run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*arguments: Any) -> nn.Module:
        model = build_model(*arguments)
        PHASES[phase](model)
        return model

    path = Path(str(run.checkpoint))
    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(run, build=build, report=lambda text: None)
    torchs, ours, where = str(caught.value).splitlines()
    assert torchs == TORCHS
    assert ours.startswith("mlp_fused: for 16 rows the network keeps ")
    assert ours.endswith(
        "Less is taken by a smaller --batch-size (begins anew), more GPUs, each a part of a batch (torchrun), "
        "--dtype bf16 (begins anew)."
    )
    assert where == f"stopped; {path} is the last checkpoint, after epoch 1: the same command with --resume carries on"
    assert [file.name for file in sorted(path.parent.iterdir())] == ["data.npz", "run.pt"]
    alone = train(dataclasses.replace(run, epochs=1, checkpoint=None), report=lambda text: None)
    for name, tensor in load_checkpoint(path)["model"].items():
        assert torch.equal(tensor, alone.model.state_dict()[name])
    resumed = train(dataclasses.replace(run, resume=True), report=lambda text: None)
    whole = train(dataclasses.replace(run, checkpoint=None), report=lambda text: None)
    assert resumed.history == whole.history


def test_the_command_that_runs_out_says_so_in_place_of_a_traceback(
    run: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.optim.Adam, "step", run_out)
    monkeypatch.setattr(memory, "room", lambda device: Room(2**20, 2**19))
    flags = ["--data", str(run.data), "--hidden", "8", "--checkpoint", str(run.checkpoint), "--device", "cpu"]
    assert main(["train", *flags]) == 2
    torchs, ours, where = capsys.readouterr().err.splitlines()
    assert torchs == f"mlp-fused: {TORCHS}"
    assert (
        "Less is taken by a smaller --batch-size, more GPUs, each a part of a batch (torchrun), --dtype bf16." in ours
    )
    assert where == f"stopped before the end of the first epoch; nothing was written to {run.checkpoint}"
    assert not Path(str(run.checkpoint)).exists()


def test_an_optimizers_state_is_counted_as_it_is() -> None:
    for name, state in loop.STATE.items():
        config = Config(optimizer=name, hidden=(8,))
        model = build_model(4, 3, config)
        optimizer = loop.make_optimizer(model, config, CPU)
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        of_weight = [each for each in optimizer.state[model[0].weight].values() if each.shape == model[0].weight.shape]
        assert len(of_weight) == state


def test_times_under_a_switch_that_distorts_are_marked(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    train(run, report=said.append)
    assert not any("mean little" in line for line in said)  # a CPU's are what they are
    said.clear()
    marked = loop.about_times(torch.device("cuda"))
    assert marked == (
        "these times mean little: CUDA_LAUNCH_BLOCKING is set, which makes every launch wait for its kernel: "
        "unset it to measure\n"
    )


# --- MLP_FUSED_DEBUG=1 ---

SETUP = """
import torch
from mlp_fused import FusedMLP
from torch.utils._python_dispatch import TorchDispatchMode

class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return function(*arguments, **keywords or {})

model = FusedMLP(4, [5, 6, 3])
x = torch.randn(2, 4)
"""
POISON = "model[3].weight.data[0, 0] = float('nan')\n"
FORWARD = r"layer 1 \(relu\), forward: 2 of 12 elements of h are NaN or infinite"
DEBUGGED = {
    "training": (POISON + "model(x)", FORWARD),
    "inference": (POISON + "with torch.inference_mode(): model(x)", FORWARD),
    "repeated": ("model(x)\nmodel(x)\n" + POISON + "model(x)", FORWARD),
    "registered operator": (POISON + "with Mode(): model(x)", FORWARD),
    "registered operator, inference": (
        POISON + "with torch.no_grad(), Mode(): model(x)",
        FORWARD,
    ),
    "input": ("model(x * float('inf'))", r"layer 0 \(relu\), forward: \d+ of 10 elements of h are NaN or infinite"),
    "backward": (
        "model(x).backward(torch.full((2, 3), float('inf')))",
        r"layer 2 \(identity\), dgrad: \d+ of 12 elements of dx are NaN or infinite",
    ),
    "backward of a registered operator": (
        "with Mode(): model(x).backward(torch.full((2, 3), float('inf')))",
        r"layer 2 \(identity\), dgrad: \d+ of 12 elements of dx are NaN or infinite",
    ),
    "parameters alone": (
        "FusedMLP(4, [3])(x).backward(torch.full((2, 3), float('inf')))",
        r"layer 0 \(identity\), wgrad: \d+ of 12 elements of dw are NaN or infinite",
    ),
}


@pytest.mark.alone
@pytest.mark.parametrize(("code", "sentence"), DEBUGGED.values(), ids=DEBUGGED)
def test_debugging_names_the_layer(code: str, sentence: str) -> None:
    found = python(SETUP + code, MLP_FUSED_DEBUG="1")
    assert re.match(f"FloatingPointError: {sentence}$", found.stderr.strip().splitlines()[-1]), found.stderr


@pytest.mark.alone
def test_debugging_changes_no_result() -> None:
    code = SETUP + "y = model(x); y.sum().backward(); y = model(x)\nprint(y.tolist(), model[0].weight.grad.tolist())"
    code = code.replace("model =", "torch.manual_seed(0); model =")
    assert python(code, MLP_FUSED_DEBUG="1").stdout == python(code).stdout != ""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kernels = {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "MLP_FUSED_BACKEND": "triton"}
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **kernels, **environment}, capture_output=True, text=True
    )


def test_debugging_names_the_layer_whose_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """An illegal access shows when the kernel is waited for; one of an earlier kernel is not this layer's."""
    kernels = layer_path.layer_path(
        (4, 3),
        (activations.IDENTITY,),
        ((torch.float32, None),),
        torch.float32,
        "ieee",
        torch_too=False,
        dropouts=(0.0,),
    ).layers[0]
    x, weight, h = torch.randn(2, 4), torch.randn(3, 4), torch.empty(2, 3)
    launch = layer_path._checked(layer_path.LayerKernels.forward_into, "forward")
    torchs = "CUDA error: an illegal memory access was encountered"
    for call, sentence in ((1, torchs), (2, f"layer 0 (identity), forward: {torchs}")):

        def illegal() -> None:
            raise RuntimeError(torchs)

        monkeypatch.setattr(layer_path, "_wait", at(call, illegal))
        with pytest.raises(RuntimeError) as caught:
            launch(kernels, x, weight, None, h, None)
        assert str(caught.value) == sentence


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_model_holds_no_tensor_of_its_calls(backend: Any, device: str) -> None:
    model = FusedMLP(8, [16, 4], activation_layer="gelu", backend=backend, device=device)
    for _ in range(3):
        x = torch.randn(5, 8, device=device, requires_grad=True)
        y = model(x)
        y.sum().backward()
        with torch.no_grad():
            inferred = model(x)
    held = [weakref.ref(tensor) for tensor in (x, y, inferred)]
    del x, y, inferred
    gc.collect()
    assert [tensor() for tensor in held] == [None] * 3


# --- The README's page on errors ---


def readme(part: str) -> str:
    found = re.search(f"<!-- {part} -->\n(.*?)<!-- /{part} -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found
    return found[1]


@pytest.mark.alone
def test_the_readmes_example_of_debugging(tmp_path: Path) -> None:
    """Its command, its program and what it says comes out."""
    program, sentence = re.findall(r"^```(?:python)?\n(.*?)^```", readme("debug"), re.MULTILINE | re.DOTALL)
    command = re.search(r"`(MLP_FUSED_DEBUG=1 .*) python nan.py`", readme("debug"))
    assert command
    (tmp_path / "nan.py").write_text(program)
    switches = dict(switch.split("=") for switch in command[1].split())
    clean = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    found = subprocess.run(
        [sys.executable, "nan.py"],
        cwd=tmp_path,
        env={**clean, **switches, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert found.stderr.strip().splitlines()[-1] == sentence.strip()


def test_the_readmes_example_of_running_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """For an H100, as `explain` plans for it."""
    model = FusedMLP(784, [4096, 4096, 10], activation_layer="gelu")
    planned = model.explain(10**6, torch.float32, "NVIDIA H100")
    monkeypatch.setattr(model, "explain", lambda rows: planned)
    monkeypatch.setattr(memory, "room", lambda device: Room(79 * 2**30, 34 * 2**30))
    error = torch.OutOfMemoryError(TORCHS)
    memory.explain(error, model, 10**6)
    assert readme("memory").strip("`\n").split() == str(error).splitlines()[1].replace("cpu", "cuda:0").split()
