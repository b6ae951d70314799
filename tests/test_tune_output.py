"""The readings of a tuning run: every tile and path, in a file of their own."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from simulated_tuning import BROKEN, DIMS, FAST, PRODUCTS, SLOW, Clock, KilledError, only, path, run, tuning_clock
from table_rows import FORWARD, NARROW, OTHER, TILE, install, problem, table

from bench import fit
from mlp_fused.engine import row_kernels, table_files, tables
from mlp_fused.errors import UserError
from mlp_fused.kernels.devices import DEVICES
from mlp_fused.tune import output, tuner
from mlp_fused.tune.config import Config
from mlp_fused.tune.tasks import Whole


@pytest.fixture
def clock() -> Clock:
    return tuning_clock()


@pytest.fixture
def config(table_folder: Path) -> Config:
    return dataclasses.replace(DIMS, readings=str(table_folder / "readings.json"))


def readings_in(config: Config) -> table_files.Table:
    assert config.readings is not None
    return table_files.read(Path(config.readings))


def test_every_measured_tile_is_written(clock: Clock, config: Config) -> None:
    table, messages = run(clock, config)
    readings = readings_in(config)
    assert readings.readings
    assert (readings.device, readings.versions, readings.date) == (table.device, table.versions, table.date)
    assert [(row.tile, row.ms) for row in readings.gemms] == [
        (SLOW, pytest.approx(2)), (FAST, pytest.approx(1))
    ] * PRODUCTS  # fmt: skip
    assert all(row.torch_ms == pytest.approx(3) for row in readings.gemms)
    assert not any(map(row_kernels.is_outdated, readings.rows))
    assert table_files.fastest(readings.gemms) == table.gemms
    assert messages.endswith(f"the table is {path()}; {2 * PRODUCTS} readings are in {config.readings}")


def test_a_tile_is_written_even_if_torch_is_faster(clock: Clock, config: Config) -> None:
    clock.seconds["torch"] = 0.5e-3
    table, _ = run(clock, config)
    assert {row.tile for row in table.gemms} == {None}
    assert [row.tile for row in readings_in(config).gemms] == [SLOW, FAST] * PRODUCTS


def test_only_torch_is_written_if_no_tile_ran(clock: Clock, config: Config) -> None:
    config = dataclasses.replace(config, dims=((3, 2),))
    tuned, _ = run(clock, config, candidates=lambda *_: (dataclasses.replace(BROKEN, block_m=3),))
    rows = readings_in(config).gemms
    assert rows == tuned.gemms
    assert {(row.tile, row.ms) for row in rows} == {(None, None)}
    assert all(row.torch_ms == pytest.approx(3) for row in rows)


def test_every_path_of_a_network_is_written(clock: Clock, config: Config) -> None:
    config = dataclasses.replace(config, dims=((16, 16, 16),), dtype=("bf16",))
    table, _ = run(clock, config, tasks=only(Whole))
    readings = readings_in(config)
    assert readings.networks == table.networks
    assert set(readings.networks[0].ms) == {"torch", "layer", "recompute", "stored"}


def test_new_readings_are_added_and_the_latest_counts(clock: Clock, config: Config) -> None:
    run(clock, dataclasses.replace(config, dims=((3, 2),)))
    before = readings_in(config)
    run(clock, config)
    clock.seconds[FAST] = 1.5e-3
    run(clock, config, candidates=lambda *_: (FAST,))
    after = readings_in(config)
    assert after.gemms[: len(before.gemms)] == before.gemms
    added = after.gemms[len(before.gemms) :]
    assert [(row.tile, row.ms) for row in added] == [(SLOW, pytest.approx(2)), (FAST, pytest.approx(1.5))] * PRODUCTS


def test_no_file_is_written_without_the_flag(clock: Clock, table_folder: Path) -> None:
    run(clock)
    assert [file.name for file in table_folder.rglob("*.json")] == [path().name]


def test_readings_of_other_versions_are_not_overwritten(clock: Clock, config: Config) -> None:
    run(clock, config)
    text = Path(str(config.readings)).read_text()
    newer = {**tuner.versions(), "triton": "9.9"}
    with pytest.raises(
        UserError, match=r"readings.json was measured with triton .*, but here is triton 9\.9; use another"
    ):
        run(clock, config, versions=lambda: newer)
    assert Path(str(config.readings)).read_text() == text


def test_tables_and_readings_are_not_confused(clock: Clock, config: Config, table_folder: Path) -> None:
    run(clock, config)
    with pytest.raises(UserError, match="readings.json has readings of every tile; use another file for --out$"):
        run(clock, Config(out=config.readings))
    with pytest.raises(UserError, match="has a table; use another file for --readings$"):
        run(clock, dataclasses.replace(config, readings=str(path()), out=str(table_folder / "other.json")))


@pytest.mark.parametrize("out", ["./t.json", "link.json", None])
def test_the_readings_need_a_file_of_their_own(
    clock: Clock, table_folder: Path, monkeypatch: pytest.MonkeyPatch, out: str | None
) -> None:
    monkeypatch.chdir(table_folder)
    Path("link.json").symlink_to("t.json")
    readings = "t.json" if out else str(path())
    with pytest.raises(UserError, match=r"^--readings is .*json, the file of the table; it needs to be another file$"):
        run(clock, dataclasses.replace(DIMS, out=out, readings=readings))
    assert not Path(readings).exists()


def test_readings_are_written_completely_or_not_at_all(
    clock: Clock, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(clock, config)
    text = Path(str(config.readings)).read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot write .*No space left on device; the old file, if any, is unchanged$"):
        run(clock, config)
    assert Path(str(config.readings)).read_text() == text


def test_readings_survive_a_killed_process(clock: Clock, config: Config) -> None:
    """The readings of the last seconds may be lost, because a long file is written rarely."""

    clock.reading_seconds = output.READINGS_EVERY / 4

    def killed(call: object) -> float:
        if len(clock.timed) == 9:
            raise KilledError
        return Clock.__call__(clock, call)

    with pytest.raises(KilledError):
        tuner.tune(
            config, report=lambda text: None, device=tuner.torch.device("cpu"), time=killed, now=lambda: clock.now,
            **clock.parts,
        )  # fmt: skip
    assert len(readings_in(config).gemms) == 4
    assert len(table_files.read(path()).gemms) == 3


ROWS = (
    FORWARD,
    dataclasses.replace(FORWARD, tile=OTHER, ms=0.3),
    dataclasses.replace(FORWARD, rows=64, ms=0.7),
    NARROW,
)
READINGS = dataclasses.replace(table(*ROWS), readings=True)


def test_a_file_of_readings_has_a_row_for_each_tile(tmp_path: Path) -> None:
    table_files.write(tmp_path / "r.json", READINGS)
    assert table_files.read(tmp_path / "r.json") == READINGS
    assert json.loads((tmp_path / "r.json").read_text())["readings"] is True
    with pytest.raises(ValueError, match="two rows of its gemms are for the same problem"):
        table_files.write(tmp_path / "t.json", dataclasses.replace(READINGS, readings=False))
    twice = dataclasses.replace(READINGS, gemms=(*READINGS.gemms, READINGS.gemms[0]))
    with pytest.raises(ValueError, match="two rows of its gemms are for the same problem"):
        table_files.write(tmp_path / "r.json", twice)


def test_the_fastest_readings_make_a_table() -> None:
    fastest = table_files.fastest(READINGS.gemms)
    assert [(row.rows, row.tile, row.ms) for row in fastest] == [(1024, TILE, 0.25), (64, None, 0.7)]


def test_readings_in_place_of_a_table_are_not_used(table_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    install(user=READINGS)
    assert tables.choice_for(problem(), DEVICES["NVIDIA H200"]).source == "estimated"
    (record,) = caplog.records
    assert "has readings of every tile; it needs to be a table, as `mlp-fused tune --out` writes" in record.getMessage()


def test_rates_are_fitted_to_every_tile() -> None:
    """Each tile of a product gives a reading of our kernels, and torch's time gives one."""
    h200 = DEVICES["NVIDIA H200"]
    products = table(FORWARD, dataclasses.replace(FORWARD, rows=2**14, ms=3.0, torch_ms=4.0)).gemms
    slow = [dataclasses.replace(row, tile=OTHER, ms=8 * row.ms) for row in products if row.ms]
    alone, every = fit.fit(products, h200), fit.fit([*products, *slow], h200)
    assert every.torch == alone.torch
    assert every.kernel != alone.kernel
