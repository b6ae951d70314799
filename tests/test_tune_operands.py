"""The tensors that the tuner measures on."""

from __future__ import annotations

import pytest
import torch
from simulated_tuning import CPU

from mlp_fused.grid import Workload
from mlp_fused.tune import operands
from mlp_fused.tune.tasks import products


def test_operands_come_from_more_memory_than_the_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        L2_cache_size = 1000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert [operands._sets(torch.device("cuda"), nbytes) for nbytes in (100, 1999, 2000, 10**6)] == [20, 2, 1, 1]
    assert operands._sets(torch.device("cuda"), 1) == operands.MOST_SETS
    assert operands._sets(CPU, 1) == 1
    product = operands.Operands(products(Workload((33, 7), 5, "bf16"))[0], CPU, count=3)
    addresses = {tensor.data_ptr() for tensors in product.sets for tensor in tensors if tensor is not None}
    assert len(addresses) == 3 * 4
    assert all((address - min(addresses)) % 16 == 0 for address in addresses)
    seen: list[int] = []
    turn = product.turns(seen.append)
    for _ in range(5):
        turn()
    assert seen == [0, 1, 2, 0, 1]
