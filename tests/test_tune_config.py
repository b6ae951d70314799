"""The settings of a tuning run, and errors for wrong ones."""

from __future__ import annotations

import math
from typing import Any

import pytest

from mlp_fused.errors import UserError
from mlp_fused.grid import Workload
from mlp_fused.tune.config import Config


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"dims": ((4,),)}, "--dims is 4; it needs to be two widths or more, each 1 or more"),
        ({"dims": ((4, 0),)}, "--dims is 4 0; it needs to be two widths or more"),
        ({"dims": ((),)}, "--dims is empty; it needs to be two widths"),
        ({"dims": ((4, 4),), "batch": (0,)}, "--batch is 0; it needs to be 1 or more"),
        ({"dims": ((4, 4),), "dtype": ("fp8",)}, "--dtype is fp8; it needs to be one of fp32, tf32, bf16, fp16"),
        ({"dims": ((4, 4),), "activation": "rleu"}, "--activation is 'rleu'; it needs to be one of: identity, "),
        ({"batch": (64,)}, "--batch is given without --dims; add --dims, or leave it out to measure the grid"),
        ({"dtype": ("fp32",)}, "--dtype is given without --dims"),
        ({"activation": "relu"}, "--activation is given without --dims"),
        ({"minutes": 0.0}, "--minutes is 0.0; it needs to be a finite number above 0"),
        ({"minutes": math.nan}, "--minutes is nan; it needs to be a finite number"),
    ],
    ids=str,
)
def test_mistakes_give_one_sentence(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=f"^{sentence}"):
        Config(**settings)


def test_settings_select_the_problems() -> None:
    asked = Config(dims=((4, 5), (6, 7, 8)), batch=(1, 2), dtype=("tf32",), activation="tanh").workloads
    assert asked == [Workload(widths, rows, "tf32", "tanh") for widths in ((4, 5), (6, 7, 8)) for rows in (1, 2)]
    assert [(workload.rows, workload.dtype, workload.activation) for workload in Config(dims=((4, 5),)).workloads] == [
        (64, "fp32", "relu"), (64, "bf16", "relu"), (1024, "fp32", "relu"), (1024, "bf16", "relu"),
    ]  # fmt: skip
