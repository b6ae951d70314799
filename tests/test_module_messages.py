"""Errors for a wrong input: the advice in them, and the cases in which it must not appear."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mlp_fused import FusedLinear, FusedMLP, fuse, linear_act

Make = Callable[..., nn.Module]


def fused_sequential(backend: Any, **where: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6, **where), nn.ReLU(), nn.Linear(6, 3, **where))
    fuse(model, backend=backend)
    return model


MODULES: dict[str, Make] = {
    "FusedMLP": lambda backend, **where: FusedMLP(4, [6, 3], backend=backend, **where),
    "FusedLinear": lambda backend, **where: FusedLinear(4, 6, activation="relu", backend=backend, **where),
    "fused": fused_sequential,
}
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
every_backend = pytest.mark.parametrize("backend", ["auto", "triton"])


def error_text(call: Callable[[], object], kind: type[Exception] = RuntimeError) -> str:
    """The text of the error that a call raises."""
    with pytest.raises(kind) as raised:
        call()
    assert "\n" not in str(raised.value)
    return str(raised.value)


HALF, SINGLE, DOUBLE, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16
ADVISED = [(HALF, SINGLE), (BF16, SINGLE), (SINGLE, BF16), (SINGLE, HALF), (HALF, BF16)]
NOT_ADVISED = [
    (torch.int64, SINGLE),
    (torch.uint8, SINGLE),
    (torch.bool, SINGLE),
    (torch.complex64, SINGLE),
    (DOUBLE, SINGLE),
    (DOUBLE, BF16),
    (SINGLE, DOUBLE),
    (HALF, DOUBLE),
]
ADVICE = ", or compute in a lower precision under torch.autocast"


@every_module
@every_backend
@pytest.mark.parametrize(("given", "stored"), ADVISED, ids=str)
def test_autocast_is_advised_where_it_helps(
    make: Make, backend: str, given: torch.dtype, stored: torch.dtype, device: str
) -> None:
    model, x = make(backend, dtype=stored, device=device), torch.ones(5, 4, device=device).to(given)
    assert error_text(lambda: model(x)) == (
        f"input is {given}, the model's weight 0 {stored}; convert it with x.to({stored}){ADVICE}"
    )
    with torch.autocast(device, BF16):
        assert model(x).dtype == BF16
    assert model(x.to(stored)).dtype == stored


@every_module
@every_backend
@pytest.mark.parametrize("cast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize(("given", "stored"), NOT_ADVISED, ids=str)
def test_autocast_is_not_advised_where_it_does_not_help(
    make: Make, backend: str, given: torch.dtype, stored: torch.dtype, cast: bool, device: str
) -> None:
    model, x = make(backend, dtype=stored, device=device), torch.ones(5, 4, device=device).to(given)
    with torch.autocast(device, BF16) if cast else contextlib.nullcontext():
        sentence = error_text(lambda: model(x))
    assert "autocast" not in sentence
    assert sentence.startswith(f"input is {given}, the model's weight 0 {stored}; ")
    fix = "take x.real, x.abs() or torch.view_as_real(x), which are real" if x.is_complex() else "convert it with x.to("
    assert fix in sentence


@pytest.mark.parametrize(
    ("array", "dtype", "code"),
    [
        (np.ones((5, 4), np.float32), SINGLE, "torch.from_numpy(x)"),
        (np.ones((5, 4)), SINGLE, "torch.from_numpy(x).float()"),
        (np.ones((5, 4), np.uint8), SINGLE, "torch.from_numpy(x).float()"),
        (np.ones((5, 4)), DOUBLE, "torch.from_numpy(x)"),
        (np.ones((5, 4), np.float32), BF16, "torch.from_numpy(x).to(torch.bfloat16)"),
        (np.ones((5, 4), object), SINGLE, "torch.from_numpy(x.astype(float)).float()"),
        (np.ones((5, 4), object), DOUBLE, "torch.from_numpy(x.astype(float))"),
    ],
    ids=["float32", "float64", "uint8", "double", "bfloat16", "object", "object to double"],
)
@every_module
@every_backend
def test_the_error_for_an_array_shows_code_that_converts_it(
    make: Make, backend: str, array: np.ndarray, dtype: torch.dtype, code: str
) -> None:
    model = make(backend, dtype=dtype)
    sentence = error_text(lambda: model(array), TypeError)
    assert sentence == f"input is ndarray; it needs to be a torch.Tensor; convert it with {code}"
    assert model(eval(code, {"torch": torch, "x": array})).dtype == dtype


class Frame:
    """A stand-in for a DataFrame."""

    def to_numpy(self) -> np.ndarray:
        return np.ones((5, 4))


def test_the_error_for_a_data_frame_shows_code_that_converts_it() -> None:
    model = FusedMLP(4, [6, 3])
    sentence = "input is Frame; it needs to be a torch.Tensor; convert it with torch.from_numpy(x.to_numpy()).float()"
    assert error_text(lambda: model(Frame()), TypeError) == sentence
    assert error_text(lambda: model([[1.0] * 4]), TypeError).endswith("; convert it with torch.as_tensor")
    assert "from_numpy(x).float()" in error_text(lambda: linear_act(np.ones((5, 4)), torch.ones(3, 4)), TypeError)


FLATTEN = "; flatten each row with x.flatten(1)"


@every_backend
@pytest.mark.parametrize(
    ("shape", "hinted"),
    [
        ((5, 1, 28, 28), True),
        ((5, 28, 28), True),
        ((5, 3, 28, 28), False),
        ((5, 1, 28, 27), False),
        ((28, 28), False),
        ((5, 783), False),
        ((5,), False),
    ],
    ids=str,
)
def test_the_error_for_unflattened_images_shows_the_fix(
    backend: Any, shape: tuple[int, ...], hinted: bool, device: str
) -> None:
    x = torch.randn(shape, device=device)
    for model in (
        FusedMLP(784, [6, 3], backend=backend, device=device),
        FusedLinear(784, 3, backend=backend, device=device),
    ):
        sentence = error_text(lambda model=model: model(x))
        assert sentence.startswith(
            f"input has shape {shape}; its last dimension needs to be 784, the width of weight 0 "
        )
        assert sentence.endswith(FLATTEN) == hinted
        if hinted:
            assert model(x.flatten(1)).shape == (5, 3)


@every_backend
def test_no_hint_on_flattening_if_an_inner_layer_does_not_fit(backend: Any, device: str) -> None:
    model = FusedMLP.from_sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(12, 3)), backend=backend)
    with pytest.raises(RuntimeError) as raised:
        model.to(device)(torch.randn(5, 2, 4, device=device))
    assert "flatten" not in str(raised.value)


WRONG: dict[str, Callable[[Any, Tensor], object]] = {
    "none": lambda model, x: model(),
    "two": lambda model, x: model(x, x),
    "keyword": lambda model, x: model(x, mask=x),
    "keyword alone": lambda model, x: model(x=x),
}


@every_module
@every_backend
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_reported_for_forward_as_in_sequential(make: Make, backend: str, name: str) -> None:
    x, twin = torch.ones(5, 4), nn.Sequential(nn.Linear(4, 6))
    model = make(backend)
    owner = "FusedLinear" if isinstance(model, FusedLinear) else "FusedMLP"
    sentence = error_text(lambda: WRONG[name](model, x), TypeError)
    expected = error_text(lambda: WRONG[name](twin, x), TypeError)
    assert sentence == expected.replace("Sequential.forward", f"{owner}.forward")


@every_module
@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda model: model.explain(), r"^explain\(\) missing 1 required positional argument: 'batch_size'$"),
        (lambda model: model.explain(8, rows=3), r"^explain\(\) got an unexpected keyword argument 'rows'"),
        (lambda model: model.warmup(rows=3), r"^warmup\(\) got an unexpected keyword argument 'rows'"),
    ],
    ids=["nothing to explain", "explain", "warmup"],
)
def test_errors_do_not_name_a_base_class(make: Make, call: Callable[[Any], object], sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        call(make("auto"))
