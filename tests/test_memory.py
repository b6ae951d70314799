"""Out of memory: the error suggests a batch that fits, and no tensor stays alive after a call."""

from __future__ import annotations

import gc
import re
import traceback
import weakref
from typing import Any

import pytest
import torch
from out_of_memory import TORCH_MESSAGE
from readme import readme
from torch import Tensor, nn

from mlp_fused import FusedMLP, fuse, memory
from mlp_fused.memory import Need, Room

CPU = torch.device("cpu")


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A device with 3 MiB, of which 1 MiB is taken, and no memory for the kernels' outputs."""

    new_empty = torch.Tensor.new_empty

    def refuse(like: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        if like.is_meta:  # torch's own call for tensors without memory
            return new_empty(like, *arguments, **keywords)
        raise torch.OutOfMemoryError(TORCH_MESSAGE)

    monkeypatch.setattr(torch.Tensor, "new_empty", refuse)
    monkeypatch.setattr(memory, "room", lambda device: Room(3 * 2**20, 2**20))
    return monkeypatch


def make_model(**settings: Any) -> FusedMLP:
    return FusedMLP(32, [64, 64, 8], activation_layer="gelu", backend="triton", **settings)


def test_an_error_in_the_forward_states_saved_bytes_and_a_batch_that_fits(full: pytest.MonkeyPatch, path: str) -> None:
    model, x = make_model(recompute=False), torch.randn(4096, 32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(torch.OutOfMemoryError) as caught:
        model(x)
    text = str(caught.value)
    plan = model.explain(4096)
    saved, workspace = plan.saved_bytes, plan.workspace_bytes + 4096 * 64 * 4
    assert saved == 4096 * (32 + 64 + 64) * 4
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    # A row needs the saved tensors, the kernels' workspace and a tensor as wide as the widest layer. Gradients and
    # Adam's two tensors are as large as the parameters.
    fits = (3 * 2**20 - 4 * parameters) * 4096 / (saved + workspace)
    assert text.startswith(
        f"{TORCH_MESSAGE}\n"
        f"mlp_fused: a batch of 4,096 rows needs {saved / 2**20:.1f} MiB of saved activations and about "
        f"{workspace / 2**20:.1f} MiB of workspace, plus {4 * parameters / 2**20:.1f} MiB for parameters, gradients "
        "and optimizer state (2 tensors per parameter). cpu has 3.0 MiB for this process, of which 1.0 MiB are in use."
    )
    assert 2048 <= fits < 4096
    assert "A batch of about 2,048 rows should fit. To use less memory: a smaller batch, recompute=True, torch" in text
    assert text.endswith("torch.autocast, or torch.inference_mode() for inference.")
    assert type(caught.value) is torch.OutOfMemoryError
    assert traceback.extract_tb(caught.tb)[-1].name == "refuse"
    full.undo()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(model(x), nn.Sequential(*model)(x))


@pytest.mark.usefixtures("full")
def test_advice_omits_what_is_already_in_use() -> None:
    def message(model: FusedMLP, dtype: torch.dtype = torch.float32) -> str:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            model(torch.randn(2, 64, 32, dtype=dtype))
        return str(caught.value).partition("mlp_fused: ")[2]

    with torch.inference_mode():
        inference = message(make_model(dtype=torch.bfloat16), torch.bfloat16)
    assert inference.startswith("a batch of 128 rows needs about 0.0 MiB of workspace, plus ")
    assert "for parameters. cpu has 3.0 MiB for this process" in inference
    assert inference.endswith(
        "By this estimate the batch fits, so the free memory is probably fragmented. "
        "To use less memory: a smaller batch."
    )
    assert "recompute" not in message(make_model(recompute=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" not in message(make_model())
    assert "autocast" in message(make_model())
    assert "autocast" not in message(make_model(dtype=torch.float64), torch.float64)  # autocast does not cast float64


@pytest.mark.usefixtures("full")
def test_a_network_within_a_network_is_explained_once() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(32, 64), nn.ReLU()), nn.LayerNorm(64), nn.Linear(64, 8), nn.ReLU())
    fuse(model, backend="triton")
    with pytest.raises(torch.OutOfMemoryError) as caught:
        model(torch.randn(16, 32))
    assert str(caught.value).count("mlp_fused: ") == 1
    assert f"plus {16 * sum(parameter.numel() for parameter in model.parameters()) / 2**20:.1f} MiB for" in str(
        caught.value
    )


@pytest.mark.usefixtures("full")
def test_a_network_that_cannot_be_explained_leaves_torchs_error() -> None:
    model = FusedMLP.from_sequential(nn.Sequential(nn.Unflatten(1, (1, 8, 4)), nn.Flatten(), nn.Linear(32, 2)))
    model.append(nn.Bilinear(2, 2, 2))  # takes two inputs, so `explain` fails
    model.backend = "triton"
    with pytest.raises(torch.OutOfMemoryError) as caught:
        model(torch.randn(4, 32))
    assert str(caught.value) == TORCH_MESSAGE


# Changes to a step of 1024 rows of 2 MiB each on a device with 1 GiB, and the number of rows that then fits.
FITS: dict[str, tuple[dict[str, Any], int | None]] = {
    "all of it": ({}, 512),
    "a part of the step is allocated already": ({"room": Room(2**30, 2**28)}, 512),
    "other tensors hold half": ({"room": Room(2**30, 2**29 + 2**31)}, 256),
    "parameters": ({"fixed": 2**30 - 3 * 2**21}, 2),
    "not one row": ({"fixed": 2**30}, 0),
    "not known": ({"room": None}, None),
    "no rows": ({"rows": 0}, None),
}


@pytest.mark.parametrize(("changes", "fits"), FITS.values(), ids=FITS)
def test_which_batch_fits(changes: dict[str, Any], fits: int | None) -> None:
    step = {"rows": 1024, "saved": 2**30, "workspace": 2**30, "fixed": 0, "device": CPU, "room": Room(2**30, 0)}
    need = Need(**{**step, **changes})
    assert need.fits == fits
    ends = {
        0: "Not even one row would fit.",
        2: "A batch of about 2 rows should fit.",
        512: "A batch of about 512 rows should fit.",
    }
    assert (" fit." in str(need)) == (fits is not None)
    assert str(need).endswith(ends.get(fits, ".") if fits is not None else ".")


def test_the_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The free memory and torch's reserved memory, up to the limit of the process."""
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
def test_a_gpu_without_enough_memory(device: str, backend: Any) -> None:
    """With a limit of 1 GiB, a whole step with the suggested batch size fits."""
    model = FusedMLP(256, [2048] * 6, activation_layer="gelu", backend=backend, device=device)
    optimizer = torch.optim.Adam(model.parameters())
    rows = 2**15
    gc.collect()  # free parts of blocks that an earlier test holds would add to the limit
    torch.cuda.empty_cache()
    allowed = torch.cuda.get_per_process_memory_fraction()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**30) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match=f"mlp_fused: a batch of {rows:,} rows needs") as caught:
            model(torch.randn(rows, 256, device=device))
        fits = int(re.search(r"A batch of about ([\d,]+) rows should fit", str(caught.value))[1].replace(",", ""))
        assert 256 <= fits < rows
        del caught  # its traceback holds tensors of the forward
        gc.collect()
        torch.cuda.empty_cache()
        model(torch.randn(fits, 256, device=device)).square().mean().backward()
        optimizer.step()
    finally:
        torch.cuda.set_per_process_memory_fraction(allowed)


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


def test_the_readmes_example_of_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the plan that `explain` makes for an H100."""
    model = FusedMLP(784, [4096, 4096, 10], activation_layer="gelu")
    planned = model.explain(10**6, torch.float32, "NVIDIA H100")
    monkeypatch.setattr(model, "explain", lambda rows: planned)
    monkeypatch.setattr(memory, "room", lambda device: Room(79 * 2**30, 34 * 2**30))
    error = torch.OutOfMemoryError(TORCH_MESSAGE)
    memory.explain(error, model, 10**6)
    assert readme("memory").strip("`\n").split() == str(error).splitlines()[1].replace("cpu", "cuda:0").split()
