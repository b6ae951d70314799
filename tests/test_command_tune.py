"""`mlp-fused tune`: its flags, its help, its errors, and Ctrl-C."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import call

from mlp_fused.tune.config import Config as TuneConfig


def test_every_flag_of_tune_reaches_its_configuration() -> None:
    seen: list[TuneConfig] = []

    def run(config: Any, report: object) -> None:
        seen.append(config)

    assert call("tune", run=run) == 0
    flags = "--dims 784 512 10 --dims 4 2 --batch 64 128 --dtype tf32 fp16 --activation gelu --minutes 2.5 --out t.json"
    flags += " --readings r.json"
    assert call("tune", *flags.split(), run=run) == 0
    expected = TuneConfig(((784, 512, 10), (4, 2)), (64, 128), ("tf32", "fp16"), "gelu", 2.5, "t.json", "r.json")
    assert seen == [TuneConfig(), expected]
    for field in dataclasses.fields(TuneConfig):
        assert "--" + field.name in flags
        assert getattr(expected, field.name) != field.default


def test_help_of_tune_states_every_flag_and_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "10000")
    assert call("tune", "--help") == 0
    entries = {entry.split()[0]: entry for entry in re.split(r"\n  (?=--)", capsys.readouterr().out)}
    for field in dataclasses.fields(TuneConfig):
        assert "default: " in entries["--" + field.name]
    assert "(default: 64 1024)" in entries["--batch"]
    assert "(default: fp32 bf16)" in entries["--dtype"]
    assert "(default: 10.0)" in entries["--minutes"]


TUNE_MISTAKES = {
    "no GPU": ((), "mlp-fused tune needs a GPU, but PyTorch can use none here; mlp-fused env prints"),
    "no GPU, a network": (("--dims", "4", "2"), "mlp-fused tune needs a GPU, but PyTorch can use none"),
    "one width": (("--dims", "4"), "--dims is 4; it needs to be two widths or more"),
    "no number": (("--dims", "4", "x"), "argument --dims: invalid int value: 'x'"),
    "batch without dims": (("--batch", "4"), "--batch is given without --dims"),
    "dtype": (("--dims", "4", "2", "--dtype", "fp8"), "argument --dtype: invalid choice: 'fp8'"),
    "minutes": (("--minutes", "-1"), "--minutes is -1.0; it needs to be a finite number above 0"),
    "no such flag": (("--minute", "1"), "unrecognized arguments: --minute 1"),
}


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(("flags", "sentence"), TUNE_MISTAKES.values(), ids=TUNE_MISTAKES)
def test_a_mistake_in_tuning_gives_one_sentence_and_exit_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], sentence: str
) -> None:
    assert call("tune", *flags) == 2
    out, err = capsys.readouterr()
    assert re.search(f"^mlp-fused( tune)?: .*{re.escape(sentence)}", err)
    assert err.count("\n") == 1
    assert out == ""


def test_ctrl_c_while_tuning(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(config: TuneConfig, report: object) -> None:
        raise KeyboardInterrupt("stopped; measured 2 of 6 problems; the table is t.json")

    assert call("tune", run=interrupted) == 130
    assert capsys.readouterr().err == "mlp-fused: stopped; measured 2 of 6 problems; the table is t.json\n"
