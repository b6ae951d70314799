"""The cost of the first call of a process, measured in fresh processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from simulated_gpu import Clock, Network
from torch import nn

from mlp_fused.module import FusedMLP
from mlp_fused.transfer import first_touch
from mlp_fused.transfer.first_touch import FirstTouch


def test_the_model_goes_to_fresh_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def run(module: str, file: str, environment: dict[str, str]) -> dict[str, float]:
        assert module == "mlp_fused.transfer.first_touch"
        model, batch = torch.load(file, weights_only=False)
        assert isinstance(model, FusedMLP)
        seen.append((environment["TRITON_CACHE_DIR"], environment["CUDA_VISIBLE_DEVICES"], batch[0].shape))
        names = ("context", "allocation", "copy", "launch", "forward", "forward_2")
        return {name: len(seen) + i for i, name in enumerate(names)}

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    actual = first_touch.in_fresh_processes(FusedMLP(3, [2]), [torch.ones(5, 3)], torch.device("cuda:1"), run)
    assert actual == FirstTouch(2000, 3000, 4000, 5000, compiled=5000, loaded=6000, again=7000)
    assert seen[0] == seen[1]
    assert seen[0][1:] == ("6", (5, 3))


def test_a_model_that_cannot_be_pickled_is_refused() -> None:
    model = nn.Linear(2, 2)
    model.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="^the model cannot be pickled: "):
        first_touch.in_fresh_processes(model, [torch.ones(1, 2)], torch.device("cuda:0"))


def test_a_network_defined_in_the_running_script_is_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Network, "__module__", "__main__")
    model = nn.Sequential(nn.Linear(2, 2), Network(Clock(), 0.0))
    with pytest.raises(RuntimeError, match="^Network is defined in the main script, .*; move it to a module"):
        first_touch.in_fresh_processes(model, [torch.ones(1, 2)], torch.device("cuda:0"))


@pytest.mark.alone
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine on which the process fails")
def test_a_fresh_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="^the process failed: .*(CUDA|NVIDIA|GPU)"):
        first_touch.in_fresh_processes(nn.Linear(2, 2), [torch.ones(1, 2)], torch.device("cuda:0"))
