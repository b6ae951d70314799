"""Scaling of features and targets: it is exact in float64, for any input dtype and any dtype of the model."""

from __future__ import annotations

import copy
import io
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mlp_fused import FusedMLP
from mlp_fused.scaling import Scaling, Unscaling, column_remarks, constant, join_modules
from mlp_fused.train.data import to_features


def test_statistics_are_column_by_column() -> None:
    x = torch.tensor([[0.0, 5.0, 1e9], [8.0, 5.0, 1e9 + 64]])
    scaled = Scaling.fit(x)(x)
    assert scaled.dtype == torch.float32
    assert scaled.tolist() == [[-2.0, 0.0, -2.0], [2.0, 0.0, 2.0]]
    assert Scaling.fit(x)(torch.tensor([[4.0, 6.0, 1e9]])).tolist() == [[0.0, 1.0, -2.0]]


def test_the_largest_and_smallest_float32_numbers() -> None:
    huge = torch.finfo(torch.float32).max
    x = torch.tensor([[huge], [-huge]])
    assert Scaling.fit(x)(x).tolist() == [[2.0], [-2.0]]


def exactly(values: list[int]) -> list[float]:
    """Compute (x - mean) / (range / 4) in rational numbers."""
    mean = Fraction(sum(values), len(values))
    return [float((value - mean) / Fraction(max(values) - min(values), 4)) for value in values]


@pytest.mark.parametrize("start", [0, -(2**31), 2**53, 2**60 + 12_345, -(2**62) - 7, 2**63 - 400, 2**63 + 5], ids=str)
@pytest.mark.parametrize("steps", [(0, 1, 2, 7), (0, 3, 50, 399), (0, 0, 0, 1)], ids=str)
def test_integers_of_any_size_are_centred_exactly(start: int, steps: tuple[int, ...]) -> None:
    values = [start + step for step in steps]
    x = to_features(np.array(values))
    assert Scaling.fit(x)(x).flatten().tolist() == torch.tensor(exactly(values)).tolist()


def test_integers_over_the_whole_range() -> None:
    values = [-(2**63), 2**63 - 1, 0, 1, -1]
    x = torch.tensor(values)[:, None]
    assert Scaling.fit(x)(x).flatten().tolist() == pytest.approx(exactly(values), abs=1e-15)


def test_small_integers_are_scaled_as_their_float64() -> None:
    x = torch.randint(-1000, 1000, (50, 3))
    scaling = Scaling.fit(x)
    assert torch.equal(scaling(x), scaling(x.double()))
    assert torch.equal(scaling.mean, Scaling.fit(x.double()).mean)


INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint64)
DTYPES = (*INTEGERS, torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_accepted(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    scaling = Scaling.fit(x)
    assert torch.equal(scaling(x.to(dtype)), scaling(x))
    assert torch.equal(Scaling.fit(x.to(dtype))(x), scaling(x))


@pytest.mark.parametrize("offset", [1.7e9, -5.4e6, 1e15], ids=str)
def test_a_large_mean_costs_no_accuracy(offset: float) -> None:
    x = torch.randint(0, 1000, (500, 2)).double()
    assert torch.equal(Scaling.fit(x + offset)(x + offset), Scaling.fit(x)(x))


CASTS: dict[str, Any] = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "float": lambda model: model.float(),
    "double": lambda model: model.double(),
    "to": lambda model: model.to(torch.bfloat16),
    "to device and dtype": lambda model: model.to("cpu", torch.float16),
    "type": lambda model: model.type(torch.float16),
    "copied": lambda model: copy.deepcopy(model.half()),
    "back": lambda model: model.half().float(),
}


def make_model(x: Tensor, *, targets: bool = False) -> nn.Sequential:
    unscaling = Unscaling(torch.tensor([1.7e9], dtype=torch.float64), torch.tensor([3.0])) if targets else None
    return join_modules(Scaling.fit(x), FusedMLP(x.shape[1], [8, 1]), unscaling)


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_cast_changes_the_result_but_not_the_statistics(cast: Any) -> None:
    x = torch.randn(20, 3, dtype=torch.float64) + 1.7e9
    model = make_model(x, targets=True)
    before = {name: value.clone() for name, value in model.state_dict().items() if "scaling" in name}
    scaled = model.scaling(x)
    cast(model)
    dtype = model.network[0].weight.dtype
    state = model.state_dict()
    for name, value in before.items():
        assert state[name].dtype == torch.float64
        assert torch.equal(state[name], value), name
    assert model.scaling(x).dtype == dtype
    assert torch.equal(model.scaling(x), scaled.to(dtype) if dtype != torch.float64 else model.scaling(x))
    assert model(x).dtype == torch.float64


def test_autocast_applies_to_the_network_but_not_to_the_scaling() -> None:
    x = torch.randn(20, 3, dtype=torch.float64) + 1.7e9
    model = make_model(x)
    expected = model.network(model.scaling(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.scaling(x), Scaling.fit(x)(x))
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.float(), expected, atol=0.05)


def test_the_statistics_stay_on_the_cpu_for_a_device_without_float64() -> None:
    """Such a device is MPS, whose tensors cannot be float64."""
    x = torch.randn(20, 3, dtype=torch.float64)
    scaling = Scaling.fit(x)
    expected = scaling(x)

    def to_such_a_device(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return tensor.clone()

    assert torch.equal(scaling._apply(to_such_a_device)(x), expected)


def test_the_model_is_saved_and_loaded_under_its_keys() -> None:
    x = torch.randn(20, 3, dtype=torch.float64) + 1.7e9
    model, other = make_model(x, targets=True), make_model(torch.randn(4, 3), targets=True)
    keys = ["scaling.mean", "scaling.scale", "scaling.remainder", "network.0.weight", "network.0.bias"]
    keys += ["network.3.weight", "network.3.bias", "unscaling.mean", "unscaling.scale"]
    assert list(model.state_dict()) == keys
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), model(x))


def test_the_input_is_not_changed() -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    before = x.clone()
    Scaling.fit(x)(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(4, 2), (4, 1), (3, 4), ()], ids=str)
def test_other_features_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="^x is of shape .*; it needs 3 features in its last dimension$"):
        Scaling.fit(torch.randn(5, 3))(torch.randn(shape))


def test_batches_of_any_rank() -> None:
    x = torch.randn(5, 3)
    scaling = Scaling.fit(x)
    assert torch.equal(scaling(x[None, :, None])[0, :, 0], scaling(x))
    assert torch.equal(scaling(x[2]), scaling(x)[2])


def test_scaling_in_parts_gives_the_same_result() -> None:
    x = torch.randn(50, 3)
    scaling = Scaling.fit(x)
    assert torch.equal(scaling.in_parts(x, rows=7), scaling(x))
    assert scaling.in_parts(x[:0]).shape == (0, 3)


def test_features_are_rounded_first_for_checkpoints_of_format_1() -> None:
    """The networks in such checkpoints were trained with features that were rounded to float32."""
    x = torch.randn(50, 2, dtype=torch.float64) + 1e6
    scaling = Scaling.fit(x.float())
    rounded = Scaling(scaling.mean, scaling.scale, scaling.remainder, rounding=torch.float32)
    assert torch.equal(rounded(x), scaling(x.float()))
    assert not torch.equal(rounded(x), scaling(x))


@pytest.mark.parametrize("offset", [0, 1.7e9], ids=str)
def test_targets_are_scaled_to_mean_0_and_variance_1_and_back(offset: float) -> None:
    y = torch.randn(400, 2, dtype=torch.float64) * torch.tensor([3.0, 1e-3]) + offset
    scaling = Scaling.fit_targets(y)
    scaled = scaling(y)
    assert torch.allclose(scaled.mean(dim=0), torch.zeros(2), atol=1e-6)
    assert torch.allclose(scaled.var(dim=0, correction=0), torch.ones(2), rtol=1e-3)
    back = Unscaling(scaling.mean, scaling.scale)(scaled)
    assert back.dtype == torch.float64
    assert torch.allclose(back, y, rtol=0, atol=2e-6)


def test_constant_targets_are_only_centred() -> None:
    y = torch.full((30, 1), 0.1, dtype=torch.float64)
    assert Scaling.fit_targets(y).scale.tolist() == [1.0]
    assert torch.allclose(Scaling.fit_targets(y)(y), torch.zeros(30, 1), atol=1e-15)


@pytest.mark.parametrize("size", [1e-170, 1e-300])
def test_tiny_targets_are_scaled(size: float) -> None:
    y = size * torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    scaling = Scaling.fit_targets(y)
    assert scaling(y).flatten().tolist() == pytest.approx([-(1.5**0.5), 0, 1.5**0.5])
    assert Unscaling(scaling.mean, scaling.scale)(scaling(y)).flatten().tolist() == pytest.approx(y.flatten().tolist())


@pytest.mark.parametrize("fit", [Scaling.fit, Scaling.fit_targets])
def test_the_smallest_range_gives_finite_numbers(fit: Any) -> None:
    x = torch.tensor([[0.0], [5e-324]], dtype=torch.float64)
    assert fit(x)(x).isfinite().all()
    assert fit(x)(x).unique().numel() == 2


def remarks_on(x: np.ndarray) -> list[str]:
    rows = to_features(x)
    return column_remarks(rows, Scaling.fit(rows)(rows))


def test_constant_columns_get_a_remark() -> None:
    x = np.random.default_rng(0).normal(size=(50, 9))
    assert remarks_on(x) == []
    x[:, 4] = 1.7e9
    assert remarks_on(x) == ["constant in the training rows: 1 of 9 features (column 4, counted from 0)"]
    x[:, :7] = 0.1
    numbers = "columns 0, 1, 2, 3, 4, ..., counted from 0"
    assert remarks_on(x) == [f"constant in the training rows: 7 of 9 features ({numbers})"]


@pytest.mark.parametrize("outlier", [1e12, -1e30], ids=str)
def test_columns_collapsed_by_outliers_get_a_remark(outlier: float) -> None:
    x = np.random.default_rng(0).normal(size=(50, 3))
    x[17, 2] = outlier
    assert remarks_on(x) == [
        "stretched by outliers, so that most of their values become equal in float32: 1 of 3 features (column 2, "
        "counted from 0); clip the outliers or take logarithms"
    ]


def test_large_means_and_a_moderate_outlier_get_no_remark() -> None:
    x = np.random.default_rng(0).normal(loc=(1.7e9, 0, 5e6), size=(50, 3))
    x[17, 1] = 1000
    assert remarks_on(x) == []
    assert remarks_on(np.random.default_rng(0).integers(0, 2, (9000, 2))) == []


def test_unsigned_columns() -> None:
    assert constant(to_features(np.full((4, 1), 2**64 - 1, np.uint64))) == [0]
    assert remarks_on(np.arange(40, dtype=np.uint64)[:, None] + np.uint64(2**63)) == []
