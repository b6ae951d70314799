"""Measured tables: the row used for each problem, complete and validated files, and the fallback without a file."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from table_rows import FORWARD, H200, NARROW, OTHER, TILE, VERSIONS, estimated, install, problem, table

import mlp_fused
from mlp_fused.engine import paths, table_files, tables
from mlp_fused.engine.row_kernels import is_outdated
from mlp_fused.engine.table_files import Gemm, Network, Table
from mlp_fused.kernels import layer_tiles
from mlp_fused.kernels.devices import DEVICES
from mlp_fused.kernels.tile_config import Problem, TileConfig

DATA = Path(__file__).with_name("data") / "h100"


MILLISECONDS = st.floats(1e-6, 1e6)
WIDTH = st.integers(1, 2**20)
KERNEL = st.none() | st.just("0123456789abcdef")
POWERS = st.sampled_from([16, 32, 64, 128, 256])
# The precisions of fp32 tiles, by PyTorch's setting.
PRECISIONS = {("float32", "ieee"): ("ieee", "bf16x6", "fp16x3"), ("float32", "tf32"): ("tf32", "fp16x1")}


@st.composite
def gemms(draw: st.DrawFn) -> Gemm:
    kind = draw(st.sampled_from(table_files.KINDS))
    dtype = draw(st.sampled_from(["float16", "bfloat16", "float32"]))
    precision = draw(st.sampled_from(["ieee", "tf32"])) if dtype == "float32" else "ieee"
    tile = TileConfig(
        draw(POWERS), draw(POWERS), draw(POWERS), draw(st.integers(1, 16)), draw(st.sampled_from([1, 2, 4, 8, 16])),
        draw(st.integers(1, 6)), draw(st.integers(1, 200)) if kind == "wgrad" else 1, draw(st.integers(0, 500)),
        draw(st.sampled_from(PRECISIONS.get((dtype, precision), (precision,)))),
        draw(st.booleans()), 1, kind == "dgrad" and draw(st.booleans()), draw(st.booleans()),
    )  # fmt: skip
    tile = draw(st.sampled_from([tile, None]))  # type: ignore[assignment]
    ms = draw(MILLISECONDS) if tile else draw(st.none() | MILLISECONDS)
    activation = draw(st.sampled_from([None, "identity", "relu", "gelu"]))
    times = ms, draw(MILLISECONDS)
    return Gemm(
        kind, draw(WIDTH), draw(WIDTH), draw(WIDTH), dtype, precision, activation, tile, *times, kernel=draw(KERNEL),
        planes_ms=draw(st.none() | MILLISECONDS) if dtype == "float32" else None,
    )  # fmt: skip


@st.composite
def networks(draw: st.DrawFn) -> Network:
    training = draw(st.booleans())
    paths = table_files.TRAINING_PATHS if training else table_files.INFERENCE_PATHS
    ms = draw(st.dictionaries(st.sampled_from(paths), MILLISECONDS, min_size=1))
    dtype = draw(st.sampled_from(["float16", "bfloat16", "float32"]))
    widths = tuple(draw(st.lists(WIDTH, min_size=2, max_size=6)))
    path = draw(st.sampled_from(sorted(ms)))
    return Network(widths, draw(WIDTH), dtype, "ieee", "gelu", training, path, ms, draw(KERNEL))


TABLES = st.builds(
    Table,
    st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1),
    st.just("2026-01-31T12:00:00+00:00"),
    st.just(VERSIONS),
    st.lists(gemms(), unique_by=lambda row: row.key, max_size=4).map(tuple),
    st.lists(networks(), unique_by=lambda row: row.key, max_size=4).map(tuple),
)


@given(TABLES)
def test_a_written_table_is_read_back(tmp_path_factory: pytest.TempPathFactory, written: Table) -> None:
    path = tmp_path_factory.mktemp("t") / "a" / "table.json"
    table_files.write(path, written)
    assert table_files.read(path) == written
    assert [file.name for file in path.parent.iterdir()] == ["table.json"]


def test_a_file_has_one_line_per_row_without_default_values(tmp_path: Path) -> None:
    table_files.write(tmp_path / "t.json", table(FORWARD, dataclasses.replace(FORWARD, rows=64, tile=None), NARROW))
    lines = (tmp_path / "t.json").read_text().splitlines()
    rows = [json.loads(line.strip().rstrip(",")) for line in lines if line.startswith("  {")]
    assert len(rows) == 3
    assert rows[0]["tile"] == {
        "block_m": 64, "block_n": 32, "block_k": 64, "group_m": 8, "num_stages": 3, "programs": 132,
        "descriptors": True,
    }  # fmt: skip
    assert rows[1]["tile"] is None


def test_a_table_is_written_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.json"
    table_files.write(path, table(FORWARD))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        table_files.write(path, table())
    assert table_files.read(path) == table(FORWARD)
    assert [file.name for file in tmp_path.iterdir()] == ["t.json"]


def test_an_unreadable_table_is_not_written(tmp_path: Path) -> None:
    bad = dataclasses.replace(FORWARD, torch_ms=0.0)
    with pytest.raises(ValueError, match=r"gemms\[0\]\.torch_ms is 0\.0, which is not a valid value"):
        table_files.write(tmp_path / "t.json", table(bad))
    assert not list(tmp_path.iterdir())


# Changes to the content of a good file, and a regular expression for the error of each.
DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "schema": (lambda t: t.update(schema=5), "schema is 5; it needs to be one of 1, 2, 3, 4"),
    "schema true": (lambda t: t.update(schema=True), "schema is true; it needs to be one of 1, 2, 3, 4"),
    "no gemms": (lambda t: t.pop("gemms"), "the table has no gemms"),
    "no networks": (lambda t: t.pop("networks"), "the table has no networks"),
    "arch": (lambda t: t.update(arch=9.0), r"arch is 9\.0, which"),
    "multiprocessors": (lambda t: t.update(multiprocessors=0), "multiprocessors is 0, which"),
    "product's activation": (lambda t: gemm(t, activation=1), r"gemms\[0\]\.activation is 1, which"),
    "no activation": (lambda t: t["gemms"][0].pop("activation"), r"gemms\[0\] has no activation"),
    "unknown": (lambda t: t.update(note="x"), 'the table has an unknown field "note"'),
    "device": (lambda t: t.update(device="--"), 'device is "--", which'),
    "two lines": (lambda t: t.update(device="a\nb"), r'device is "a\\nb", which'),
    "date": (lambda t: t.update(date="yesterday"), 'date is "yesterday", which'),
    "local time": (lambda t: t.update(date="2026-01-31T12:00:00"), "date is .*, which"),
    "versions": (lambda t: t["versions"].pop("torch"), "versions is .*, which is not a valid value"),
    "two toolkits": (lambda t: t["versions"].update(hip="7"), "versions is .*, which is not a valid value"),
    "no toolkit": (lambda t: t["versions"].pop("cuda"), "versions is .*, which is not a valid value"),
    "version": (lambda t: t["versions"].update(torch=2), "versions is .*, which is not a valid value"),
    "gemms": (lambda t: t.update(gemms={}), "gemms is {}, which"),
    "row": (lambda t: t["gemms"].append(1), r"gemms\[1\] is 1, which is not an object"),
    "kind": (lambda t: gemm(t, kind="fgrad"), r'gemms\[0\]\.kind is "fgrad", which'),
    "rows": (lambda t: gemm(t, rows=0), r"gemms\[0\]\.rows is 0, which"),
    "rows true": (lambda t: gemm(t, rows=True), r"gemms\[0\]\.rows is true, which"),
    "rows as text": (lambda t: gemm(t, rows="1"), r'gemms\[0\]\.rows is "1", which'),
    "dtype": (lambda t: gemm(t, dtype="bf16"), r'dtype is "bf16", which'),
    "tf32": (lambda t: gemm(t, precision="tf32"), r'precision is "tf32", which'),
    "ms": (lambda t: gemm(t, ms=-1), r"gemms\[0\]\.ms is -1, which"),
    "no ms": (lambda t: gemm(t, ms=None), r"gemms\[0\]\.ms is null, which"),
    "NaN": (lambda t: gemm(t, torch_ms=float("nan")), r"gemms\[0\]\.torch_ms is NaN, which"),
    "huge": (lambda t: gemm(t, torch_ms=10**400), r"gemms\[0\]\.torch_ms is 10+\.\.\., which"),
    "kernel": (lambda t: gemm(t, kernel=7), r"gemms\[0\]\.kernel is 7, which"),
    "network's kernel": (lambda t: net(t, kernel=""), r'networks\[0\]\.kernel is "", which'),
    "twice": (lambda t: t["gemms"].append(t["gemms"][0]), "two rows of its gemms are for the same problem"),
    "tile": (lambda t: gemm(t, tile=[64]), r"gemms\[0\]\.tile is \[64\], which is not an object"),
    "field": (lambda t: tile(t, block_l=16), r'gemms\[0\]\.tile has an unknown field "block_l"'),
    "block": (lambda t: tile(t, block_m=48), r"tile\.block_m is 48, which"),
    "small block": (lambda t: tile(t, block_k=8), r"tile\.block_k is 8, which"),
    "no block": (lambda t: t["gemms"][0]["tile"].pop("block_n"), r"tile\.block_n is 0, which"),
    "group": (lambda t: tile(t, group_m=0), r"tile\.group_m is 0, which"),
    "warps": (lambda t: tile(t, num_warps=3), r"tile\.num_warps is 3, which"),
    "stages": (lambda t: tile(t, num_stages=2.0), r"tile\.num_stages is 2\.0, which"),
    "split": (lambda t: tile(t, split=2), r"tile\.split is 2, which"),
    "programs": (lambda t: tile(t, programs=-1), r"tile\.programs is -1, which"),
    "planes": (lambda t: gemm(t, planes_ms=0.1), r"gemms\[0\]\.planes_ms is 0\.1, which"),
    "no planes": (lambda t: gemm(t, dtype="float32", planes_ms=0), r"gemms\[0\]\.planes_ms is 0, which"),
    "planes of 16 bits": (lambda t: tile(t, precision="fp16x3"), r'tile\.precision is "fp16x3", which'),
    "tile precision": (lambda t: tile(t, precision="bf16x6"), r'tile\.precision is "bf16x6", which'),
    "descriptors": (lambda t: tile(t, descriptors=1), r"tile\.descriptors is 1, which"),
    "early": (lambda t: tile(t, early=True), r"tile\.early is true, which"),
    "parts": (lambda t: tile(t, parts=4), r"tile\.parts is 4, which"),
    "widths": (lambda t: net(t, widths=[64]), r"networks\[0\]\.widths is \[64\], which"),
    "width": (lambda t: net(t, widths=[64, 0]), r"networks\[0\]\.widths is \[64, 0\], which"),
    "training": (lambda t: net(t, training=1), r"networks\[0\]\.training is 1, which"),
    "path": (lambda t: net(t, path="layer"), r'networks\[0\]\.path is "layer", which'),
    "other paths": (lambda t: net(t, training=False), r"networks\[0\]\.ms is .*stored"),
    "no paths": (lambda t: net(t, ms={}), r'networks\[0\]\.path is "stored", which'),
    "activation": (lambda t: net(t, activation=""), r'networks\[0\]\.activation is "", which'),
}  # fmt: skip


def gemm(content: dict[str, Any], **values: Any) -> None:
    content["gemms"][0].update(values)


def tile(content: dict[str, Any], **values: Any) -> None:
    content["gemms"][0]["tile"].update(values)


def net(content: dict[str, Any], **values: Any) -> None:
    content["networks"][0].update(values)


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES.values(), ids=DAMAGES)
def test_damage_gives_one_sentence(tmp_path: Path, damage: Callable[[dict[str, Any]], object], sentence: str) -> None:
    path = tmp_path / "t.json"
    table_files.write(path, table(FORWARD, NARROW))
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} is not a measured table: .*{sentence}") as raised:
        table_files.read(path)
    assert "\n" not in str(raised.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.data())
def test_any_damage_is_detected_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Replace a random value of a good file. Reading gives an error, or a table that can be written again."""
    path = tmp_path_factory.mktemp("t") / "t.json"
    table_files.write(path, table(FORWARD, NARROW))
    content = json.loads(path.read_text())
    place: Any = content
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
            place = place[key]
        else:
            break
    place[key] = data.draw(JSON)
    path.write_text(json.dumps(content))
    try:
        loaded = table_files.read(path)
    except ValueError as error:
        sentence = str(error)
    else:
        table_files.write(path, loaded)
        assert table_files.read(path) == loaded
        return
    assert sentence.startswith(f"{path} is not a measured table: ")
    assert "\n" not in sentence


@given(st.binary(max_size=40) | st.text().map(str.encode) | st.integers(0, 400).map(lambda size: size))
def test_any_other_file_is_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes | int) -> None:
    path = tmp_path_factory.mktemp("t") / "t.json"
    table_files.write(path, table(FORWARD, NARROW))
    path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    with pytest.raises(ValueError, match=r"is not JSON|is not a measured table"):
        table_files.read(path)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        table_files.read(tmp_path / "t.json")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        table_files.read(tmp_path)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"deep\.json is not JSON"):
        table_files.read(tmp_path / "deep.json")


def test_precedence_user_packaged_rule(table_folder: Path) -> None:
    assert estimated(problem()) not in (TILE, OTHER)
    assert tables.tile_for(problem(), H200) == estimated(problem())
    install(packaged=table(FORWARD))
    assert tables.tile_for(problem(), H200) == TILE
    install(user=table(dataclasses.replace(FORWARD, tile=OTHER, rows=2048)))
    assert tables.tile_for(problem(), H200) == OTHER  # the user's row, although the packaged one has this batch size
    assert tables.tile_for(problem(600), H200) == TILE  # more than twice the user's batch size
    install(user=table(dataclasses.replace(FORWARD, tile=None)))
    assert tables.tile_for(problem(), H200) is None
    assert tables.tile_for(problem(), DEVICES["NVIDIA H100"]) == estimated(problem(), DEVICES["NVIDIA H100"])
    assert (table_folder / "cache" / "mlp_fused" / "nvidia_h200.json").is_file()
    assert (table_folder / "tuned" / "nvidia_h200.json").is_file()


def test_a_row_is_used_for_its_problem_and_the_nearest_batch(table_folder: Path) -> None:
    larger = dataclasses.replace(FORWARD, rows=4096, tile=OTHER)
    install(table(FORWARD, larger))
    for rows, expected in ((512, TILE), (2000, TILE), (2100, OTHER), (8192, OTHER)):
        assert tables.tile_for(problem(rows), H200) == expected, rows
    for rows in (511, 8193):
        assert tables.tile_for(problem(rows), H200) == estimated(problem(rows)), rows
    for others in ({"n": 513}, {"k": 255}, {"dtype": torch.float16}, {"kind": "dgrad"}, {"activation": "gelu"}):
        other = problem(**others)
        assert tables.tile_for(other, H200) == estimated(other)
    pointwise = Problem("output_gradient", 1024, 512, 0, torch.bfloat16)
    assert tables.tile_for(pointwise, H200) == estimated(pointwise)


@pytest.mark.parametrize("kind", table_files.KINDS)
def test_a_row_is_found_by_its_own_problem(table_folder: Path, kind: str) -> None:
    row = dataclasses.replace(FORWARD, kind=kind, tile=OTHER)
    install(table(row))
    assert (row.problem.rows, row.problem.widths) == (1024, (512, 256))
    assert tables.tile_for(row.problem, H200) == OTHER


def test_descriptors_are_used_only_if_possible(table_folder: Path) -> None:
    install(table(FORWARD, dataclasses.replace(FORWARD, rows=1100, tile=OTHER)))
    assert tables.tile_for(problem(1024), H200) == TILE
    assert tables.tile_for(problem(1024, aligned=False), H200) == OTHER
    install(table(FORWARD))
    unaligned = problem(aligned=False)
    assert tables.tile_for(unaligned, H200) == estimated(unaligned)
    install(table(dataclasses.replace(FORWARD, tile=None)))
    assert tables.tile_for(unaligned, H200) is None


def test_a_row_is_used_for_its_own_activation(table_folder: Path) -> None:
    """In dgrad of 512 columns, torch was faster with gelu, and our kernel with relu."""
    gelu = dataclasses.replace(FORWARD, kind="dgrad", activation="gelu", tile=None)
    relu = dataclasses.replace(gelu, activation="relu", tile=OTHER)
    install(table(gelu, relu))
    assert tables.choice_for(gelu.problem, H200) == tables.Choice(None, f"measured on {H200.name}")
    assert tables.choice_for(relu.problem, H200) == tables.Choice(OTHER, f"measured on {H200.name}")
    tanh = dataclasses.replace(gelu.problem, activation="tanh")
    assert tables.choice_for(tanh, H200) == tables.Choice(estimated(tanh), "estimated")


def test_rows_of_schema_1_are_used_for_activations_without_a_row(table_folder: Path) -> None:
    written = json.loads((DATA / "tuned.json").read_text())
    assert written["schema"] == 1
    old = table_files.read(DATA / "tuned.json")
    assert len(old.gemms) == len(written["gemms"]) == 465
    assert (old.arch, old.multiprocessors) == (None, None)
    assert {row.activation for row in old.gemms if row.kind == "wgrad"} == {"identity"}
    assert {row.activation for row in old.gemms if row.kind != "wgrad"} == {None}
    assert {row.kernel for row in old.gemms} == {None}
    unnamed = dataclasses.replace(FORWARD, activation=None, tile=OTHER)
    install(table(FORWARD, unnamed))
    assert tables.tile_for(problem(), H200) == TILE
    assert tables.tile_for(problem(activation="gelu"), H200) == OTHER
    table_files.write(table_folder / "new.json", old)  # written as schema 4, with unknown activations
    assert table_files.read(table_folder / "new.json") == old


def test_a_related_gpu_shares_tiles_and_compute_bound_choices(table_folder: Path) -> None:
    wide = Gemm("forward", 8192, 4096, 4096, "bfloat16", "ieee", "relu", TILE, 1.0, 2.0)
    torchs = dataclasses.replace(wide, activation="gelu", tile=None)
    thin = Gemm("wgrad", 2**20, 64, 64, "bfloat16", "ieee", "identity", OTHER, 1.0, 2.0)
    slow = dataclasses.replace(thin, width_out=32, tile=None)
    known = layer_tiles.candidates(wide.problem, H200)[-1]
    wide, thin = dataclasses.replace(wide, tile=known), dataclasses.replace(thin, tile=OTHER)
    size = {"arch": H200.arch, "multiprocessors": H200.multiprocessors}
    install(packaged=dataclasses.replace(table(wide, torchs, thin, slow, device="NVIDIA H100 80GB HBM3"), **size))
    measured_there = "measured on NVIDIA H100 80GB HBM3"
    assert tables.choice_for(wide.problem, H200) == tables.Choice(known, measured_there)
    assert tables.choice_for(torchs.problem, H200) == tables.Choice(None, measured_there)
    # If memory-bound, the estimate for this GPU decides between torch and us, and the other GPU's row gives the tile.
    assert layer_tiles.why_torch(thin.problem, H200) is layer_tiles.why_torch(slow.problem, H200) is None
    assert tables.choice_for(thin.problem, H200) == tables.Choice(OTHER, f"tile {measured_there}")
    assert tables.choice_for(slow.problem, H200) == tables.Choice(estimated(slow.problem), "estimated")
    for other in (
        dataclasses.replace(H200, multiprocessors=114),  # an H100 for PCIe
        dataclasses.replace(H200, name="NVIDIA H100 80GB HBM3 MIG 7g.80gb"),
        dataclasses.replace(H200, arch=100),
    ):
        assert tables.related(other) == ()
        assert "measured" not in tables.choice_for(thin.problem, other).source


def test_the_packaged_tables_are_used(table_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of a table is named after its device. On that device, rows of the current kernels are used.

    If another Triton measured the table, only known tiles are used.
    """
    monkeypatch.setattr(tables, "PACKAGED", Path(layer_tiles.__file__).parent / "tuned")
    paths.forget_tables()
    packaged_files = list(tables.PACKAGED.glob("*.json"))
    assert packaged_files
    for path in packaged_files:
        packaged = table_files.read(path)
        assert path == tables.packaged_path(packaged.device)
        assert packaged.arch is not None
        like = next(known for known in DEVICES.values() if known.name in packaged.device)
        device = dataclasses.replace(like, name=packaged.device)
        checked = 0
        for row in packaged.gemms:
            same_triton = packaged.versions["triton"].startswith(".".join(map(str, tables.TRITON_VERSION)))
            if is_outdated(row):
                continue
            if row.tile is None or same_triton or row.tile in layer_tiles.candidates(row.problem, device):
                assert tables.choice_for(row.problem, device) == tables.Choice(row.tile, f"measured on {device.name}")
                checked += 1
        assert checked > 100


def test_the_path_of_a_network(table_folder: Path) -> None:
    larger = dataclasses.replace(NARROW, rows=2**20, path="torch")
    install(user=table(NARROW), packaged=table(NARROW, larger))

    def path(training: bool = True, activation: str = "relu") -> str | None:
        return tables.path_for((64, 64, 64), torch.float16, "ieee", activation, training, H200)

    assert path() == "stored"  # the user's row with the largest batch
    install(user=table(NARROW, larger))
    assert path() == "torch"
    assert path(training=False) is None
    assert path(activation="gelu") is None


def test_merging_keeps_rows_without_a_new_reading() -> None:
    remeasured = dataclasses.replace(FORWARD, tile=None)
    other = dataclasses.replace(FORWARD, rows=64)
    old = table(FORWARD, other, NARROW)
    new = dataclasses.replace(table(remeasured), date="2027-01-01T00:00:00+00:00")
    merged = tables.merge(old, new)
    assert merged == dataclasses.replace(new, gemms=table(remeasured, other).gemms, networks=table(NARROW).networks)
    with pytest.raises(ValueError, match="measured on NVIDIA H200; it needs to be measured on NVIDIA H100"):
        tables.merge(old, table(device="NVIDIA H100"))


def test_paths_of_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for unset in (None, "", "relative"):
        if unset is None:
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert tables.user_path("NVIDIA H200") == Path("/home/me/.cache/mlp_fused/nvidia_h200.json")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert tables.user_path("NVIDIA H200") == Path("/cache/mlp_fused/nvidia_h200.json")
    here = Path(layer_tiles.__file__).resolve().parent
    assert here in (Path(mlp_fused.__file__).resolve().parents[1] / "kernels", Path(mlp_fused.__path__[0]) / "kernels")
    assert tables.packaged_path("NVIDIA H200").name == "nvidia_h200.json"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "is not JSON: .+"),
        (b"{}", "is not a measured table: schema is null; .+"),
        (table(FORWARD, device="NVIDIA H100"), "was measured on NVIDIA H100; it needs to be measured on NVIDIA H200"),
    ],
    ids=["not JSON", "no table", "another device"],
)
def test_a_broken_table_gives_one_warning_and_is_not_used(
    table_folder: Path, caplog: pytest.LogCaptureFixture, content: bytes | Table, sentence: str
) -> None:
    install(packaged=table(FORWARD))
    path = tables.user_path(H200.name)
    path.parent.mkdir(parents=True)
    if isinstance(content, Table):
        table_files.write(path, content)
    else:
        path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "mlp_fused"):
        for rows in (1024, 1025):
            assert tables.tile_for(problem(rows), H200) == TILE  # the row of the packaged table
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("mlp_fused", "WARNING")
    fix = "it is not used; delete it, and run `mlp-fused tune` to write a new one"
    assert re.match(f"{re.escape(str(path))}:? {sentence}; {fix}$", record.getMessage())


@pytest.mark.parametrize(("count", "rows_are"), [(1, "this row is"), (3, "this and 2 more rows are")])
def test_only_tiles_that_do_not_fit_are_skipped(
    table_folder: Path, caplog: pytest.LogCaptureFixture, count: int, rows_are: str
) -> None:
    large = [dataclasses.replace(FORWARD, rows=2**i, tile=TileConfig(256, 256, 256, 8, 8, 3)) for i in range(count)]
    install(table(*large, dataclasses.replace(FORWARD, rows=2**13)))
    with caplog.at_level(logging.WARNING, "mlp_fused"):
        assert tables.tile_for(problem(1), H200) == estimated(problem(1))
        assert tables.tile_for(problem(2**13), H200) == TILE
    (record,) = caplog.records
    sentence = r"gemms\[0\]\.tile takes \d+ bytes of shared memory; NVIDIA H200 has 232448"
    path = re.escape(str(tables.user_path(H200.name)))
    message = f"{path}: {sentence}; {rows_are} not used; `mlp-fused tune` measures again"
    assert re.fullmatch(message, record.getMessage())


@pytest.mark.parametrize(("version", "is_used"), [((3, 6), False), ((3, 7), True), ((4, 0), True)])
def test_specialised_warps_need_a_triton_that_compiles_them(
    version: tuple[int, int], is_used: bool, table_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(tables, "TRITON_VERSION", version)
    tile = dataclasses.replace(TILE, warp_specialize=True)
    mine = dataclasses.replace(table(dataclasses.replace(FORWARD, tile=tile)), versions=with_triton(*version))
    install(mine)
    assert (tables.tile_for(problem(), H200) == tile) == is_used
    refused = f"{tables.user_path(H200.name)}: gemms[0].tile specializes warps; it needs Triton 3.7 or newer; this row"
    assert [record.getMessage().startswith(refused) for record in caplog.records] == [True] * (not is_used)


def with_triton(*version: int) -> dict[str, str]:
    return {**VERSIONS, "triton": ".".join(map(str, version)) + ".0"}


@pytest.mark.parametrize("whose", ["user", "packaged"])
def test_with_another_triton_only_known_tiles_are_used(
    whose: str, table_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    known = layer_tiles.candidates(FORWARD.problem, H200)[-1]
    assert TILE not in layer_tiles.candidates(FORWARD.problem, H200)
    rows = [dataclasses.replace(FORWARD, rows=rows, tile=tile) for rows, tile in ((64, TILE), (1024, known))]
    rows.append(dataclasses.replace(FORWARD, rows=2**14, tile=None))
    another = dataclasses.replace(table(*rows, NARROW), versions=with_triton(3, 4))  # a version too old to run here
    install(**{whose: another})
    with caplog.at_level(logging.INFO, "mlp_fused"):
        assert tables.tile_for(problem(64), H200) == estimated(problem(64))
        assert tables.tile_for(problem(1024), H200) == known
        assert tables.tile_for(problem(2**14), H200) is None
        assert tables.path_for((64, 64, 64), torch.float16, "ieee", "relu", True, H200) == "stored"
    (record,) = caplog.records  # logged once, not in every lookup
    path = tables.user_path(H200.name) if whose == "user" else tables.packaged_path(H200.name)
    today = ".".join(map(str, tables.TRITON_VERSION))
    assert record.getMessage() == (
        f"{path} was measured with Triton 3.4.0, but this is {today}: only its tiles that `mlp-fused tune` would "
        "measure here are used; run it to measure again"
    )
    assert (record.name, record.levelname) == ("mlp_fused", "WARNING" if whose == "user" else "INFO")


def test_a_preferred_table_is_used_before_those_on_disk(table_folder: Path) -> None:
    install(user=table(dataclasses.replace(FORWARD, tile=OTHER)))
    with tables.preferred(table(FORWARD)):
        tables.forget()
        assert tables.tile_for(problem(), H200) == TILE
        another = DEVICES["NVIDIA H100"]
        assert tables.tile_for(problem(), another) == estimated(problem(), another)
    tables.forget()
    assert tables.tile_for(problem(), H200) == OTHER


def test_tables_are_reread_only_on_request(table_folder: Path) -> None:
    rule = tables.tile_for(problem(), H200)
    table_files.write(tables.user_path(H200.name), table(FORWARD))
    assert tables.tile_for(problem(), H200) == rule
    tables.forget()
    assert tables.tile_for(problem(), H200) == TILE
