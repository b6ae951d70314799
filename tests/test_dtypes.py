"""pick_device: the device for a name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from trainings import CPU

from mlp_fused.dtypes import pick_device
from mlp_fused.errors import UserError


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == CPU


def test_each_of_several_processes_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: SimpleNamespace(item=lambda: None))
    assert [pick_device(name, 1) for name in ("auto", "cuda", "cpu")] == [torch.device("cuda:1")] * 2 + [CPU]
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="^--device cuda:1 is one GPU for several processes; --device cuda gives each"):
        pick_device("cuda:1", 0)
    with pytest.raises(UserError, match="--nproc-per-node starts more processes than this machine has GPUs, 2; each"):
        pick_device("auto", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto", 1) == CPU
