"""The description of the machine that a result was measured on."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import gpu
from bench.machine import MEASURING, ROOT, machine, user_table_digest
from mlp_fused.environment import DISTORTING


def test_the_machine_states_everything_a_time_depends_on() -> None:
    assert set(gpu.SAME) <= set(machine())


def test_a_users_own_table_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_table_digest("NVIDIA H200") is None
    path = tmp_path / "mlp_fused" / "nvidia_h200.json"
    path.parent.mkdir()
    digests = set()
    for text in ("{}", "{} "):
        path.write_text(text)
        digests.add(user_table_digest("NVIDIA H200"))
    assert None not in digests
    assert len(digests) == 2
    assert user_table_digest("NVIDIA H100") is None


@pytest.mark.parametrize("name", DISTORTING)
def test_the_machine_says_which_switch_distorts_its_times(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in DISTORTING:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "1")
    assert str(machine()["distorted"]).startswith(f"{name} is set")


def test_the_sources_that_decide_a_timing_exist() -> None:
    assert [name for name in MEASURING if not (ROOT / "bench" / name).is_file()] == []
