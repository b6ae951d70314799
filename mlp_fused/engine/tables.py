"""Measured tables: which tile, and which path, was fastest on a device.

A choice comes from the first of these that knows the problem: the user's own table,
`$XDG_CACHE_HOME/mlp_fused/<gpu>.json` (by default under ~/.cache), which `mlp-fused tune` writes; the packaged table,
kernels/tuned/<gpu>.json; the packaged table of a related GPU; the estimate (layer_tiles.py). <gpu> is
`configs.device_slug` of the device's name. A file is one JSON object, one row a line:

    {"schema": 2, "device": "NVIDIA H200", "arch": 90, "multiprocessors": 132, "date": "2026-01-31T12:00:00+00:00",
     "versions": {"mlp_fused", "python", "torch", "triton", "cuda" or "hip", "driver": each a text},
     "gemms": [
      {"kind": "forward", "rows": 8192, "width_out": 4096, "width_in": 1024, "dtype": "bfloat16", "precision": "ieee",
       "activation": "gelu", "tile": {"block_m": 128, …}, "ms": 0.12, "torch_ms": 0.13}, …],
     "networks": [
      {"widths": [64, 64, 64], "rows": 1048576, "dtype": "float16", "precision": "ieee", "activation": "relu",
       "training": true, "path": "recompute", "ms": {"recompute": 1.1, "stored": 1.4, "layer": 2.0, "torch": 3.0}}, …]}

arch        as in `Device`: 90, "gfx942"
kind        "forward", "dgrad" or "wgrad"
activation  the one in the epilogue, by name: forward: the layer's own; dgrad: the one below; wgrad: "identity"
dtype       "float16", "bfloat16" or "float32"
precision   how fp32 is multiplied: "ieee" or, for float32 alone, "tf32"
tile        the fields of `TileConfig` that are not at their defaults; null where torch's own product is faster
ms          milliseconds of our fastest tile, null where none ran; torch_ms torch's
path        what was fastest: "recompute", "stored", "layer" or "torch" in training, "network", "layer" or "torch" in
            inference; the milliseconds of each that was measured are in ms

A row holds for its own widths, dtype, precision and activation, and for batches of half to twice the measured size. A
file of schema 1 has no arch, no multiprocessors and no activations: its forward and dgrad rows (null here) hold for
every activation that no other row names.

A related GPU has the same architecture and as many multiprocessors (H100 and H200; no MIG slices): its tiles hold, and
where a product has more than `COMPUTE_BOUND` FLOPs a byte so does its choice between torch and a tile. Below, bandwidth
decides, and the estimate knows this GPU's. Milliseconds are never carried from one GPU to another.

Under another Triton (by its first two numbers) than `versions` has, what was faster is still the best guess, but a tile
may spill or not compile: of the tiles only those hold that are among `layer_tiles.candidates` here. The logger
`mlp_fused` says so once: a warning for the user's own table, which `mlp-fused tune` measures again, INFO for the
packaged one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..kernels import devices, layer_tiles, tile_config
from ..kernels.devices import Device
from ..kernels.language import TRITON_VERSION
from ..kernels.tile_config import Problem, TileConfig

__all__ = [
    "Choice",
    "Gemm",
    "Network",
    "Table",
    "asked_first",
    "choice_for",
    "forget",
    "measured",
    "merge",
    "packaged_path",
    "path_for",
    "read",
    "related",
    "tile_for",
    "user_path",
    "write",
]

logger = logging.getLogger("mlp_fused")

SCHEMA = 2
READABLE = (1, 2)
PACKAGED = Path(layer_tiles.__file__).parent / "tuned"
KINDS = ("forward", "dgrad", "wgrad")
DTYPES = ("float16", "bfloat16", "float32")
TRAINING_PATHS = ("recompute", "stored", "layer", "torch")
INFERENCE_PATHS = ("network", "layer", "torch")
FARTHEST = 2  # a row holds for so many times its rows, and for so small a part of them
COMPUTE_BOUND = 200  # FLOPs a byte of a product from which a related GPU's choice holds
TOOLKITS = ("cuda", "hip")
VERSIONS = ("mlp_fused", "python", "torch", "triton", "driver")  # and one of the toolkits


@dataclass(frozen=True)
class Gemm:
    """One product, measured. `tile` None: torch's own is faster; `ms` None: no tile of ours ran.

    `activation` None: a row of schema 1, which does not name it.
    """

    kind: str
    rows: int
    width_out: int
    width_in: int
    dtype: str
    precision: str
    activation: str | None
    tile: TileConfig | None
    ms: float | None
    torch_ms: float

    @property
    def key(self) -> tuple[Any, ...]:
        """What two rows about the same product agree in."""
        return self.kind, self.rows, self.width_out, self.width_in, self.dtype, self.precision, self.activation

    @property
    def problem(self) -> Problem:
        """The product as the rule knows it."""
        m, n, k = {
            "forward": (self.rows, self.width_out, self.width_in),
            "dgrad": (self.rows, self.width_in, self.width_out),
            "wgrad": (self.width_out, self.width_in, self.rows),
        }[self.kind]
        dtype, activation = getattr(torch, self.dtype), self.activation or "identity"
        aligned = tile_config.is_aligned(self.width_in, self.width_out, dtype)
        return Problem(self.kind, m, n, k, dtype, self.precision, aligned, activation)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Network:
    """One whole network, measured: milliseconds of each path, and the fastest."""

    widths: tuple[int, ...]
    rows: int
    dtype: str
    precision: str
    activation: str  # of the hidden layers, by name
    training: bool  # forward and backward; else inference
    path: str
    ms: Mapping[str, float]

    @property
    def key(self) -> tuple[Any, ...]:
        """What two rows about the same network agree in."""
        return self.widths, self.rows, self.dtype, self.precision, self.activation, self.training


@dataclass(frozen=True)
class Table:
    """What was measured on one device, with what."""

    device: str
    date: str  # ISO 8601, UTC
    versions: Mapping[str, str]
    gemms: tuple[Gemm, ...] = ()
    networks: tuple[Network, ...] = ()
    arch: int | str | None = None  # None: of schema 1
    multiprocessors: int | None = None

    def is_related(self, device: Device) -> bool:
        """True if the tiles of this table hold for a device: another one of the same architecture and size."""
        is_other = devices.device_slug(self.device) != devices.device_slug(device.name)
        same = (self.arch, self.multiprocessors) == (device.arch, device.multiprocessors)
        return is_other and same and "MIG" not in self.device + device.name


@dataclass(frozen=True)
class Choice:
    """A tile for a product, or torch's own product where `tile` is None; and where the choice comes from."""

    tile: TileConfig | None
    source: str


Row = TypeVar("Row", Gemm, Network)


def tile_for(problem: Problem, device: Device) -> TileConfig | None:
    """The tile for a problem; None where torch's own product is taken."""
    return choice_for(problem, device).tile


@functools.lru_cache(maxsize=4096)
def choice_for(problem: Problem, device: Device) -> Choice:
    """The tile for a problem, or torch: as measured on this device, as on a related one, or as estimated.

    A measured tile that goes through tensor descriptors does not hold for tensors that they cannot describe.
    """
    for table in measured(device):
        if row := _row_for(problem, table, device):
            return Choice(row.tile, f"measured on {table.device}")
    reason = layer_tiles.why_torch(problem, device)
    for table in related(device):
        if row := _row_for(problem, table, device):
            if _flops_a_byte(problem) > COMPUTE_BOUND:
                return Choice(row.tile, f"measured on {table.device}")
            if reason is None and row.tile is not None:
                return Choice(row.tile, f"tile measured on {table.device}")
            break
    return Choice(None if reason else layer_tiles.choose(problem, device), reason or "estimated")


def _row_for(problem: Problem, table: Table, device: Device) -> Gemm | None:
    """The row of a table that holds for a problem: of its activation, else of one that is not named."""
    width_out, width_in = problem.widths
    wanted = (problem.kind, width_out, width_in, _name(problem.dtype), problem.precision)
    rows = [
        row
        for row in table.gemms
        if (row.kind, row.width_out, row.width_in, row.dtype, row.precision) == wanted
        and (problem.aligned or row.tile is None or not row.tile.descriptors)
        and (row.tile is None or _is_of_this_triton(table) or row.tile in _known(row, problem.aligned, device))
    ]
    named = [row for row in rows if row.activation == problem.activation]
    unnamed = [row for row in rows if row.activation is None]
    return _nearest(named, problem.rows) or _nearest(unnamed, problem.rows)


def _flops_a_byte(problem: Problem) -> float:
    m, n, k = problem.m, problem.n, problem.k
    return 2 * m * n * k / ((m * k + n * k + m * n) * problem.dtype.itemsize)


@functools.lru_cache(maxsize=1024)
def path_for(
    widths: tuple[int, ...],
    rows: int | None,
    dtype: torch.dtype,
    precision: str,
    activation: str,
    training: bool,
    device: Device,
) -> str | None:
    """The path that was fastest for a network as measured; None where it was not measured.

    Args:
        widths: of the input to the output.
        rows: of the batch; None for a choice that does not depend on them: that of the largest batch measured.
        activation: of the hidden layers, by name.
        training: forward and backward; else inference.
    """
    wanted = (widths, _name(dtype), precision, activation, training)
    for table in measured(device):
        found = [
            row
            for row in table.networks
            if (row.widths, row.dtype, row.precision, row.activation, row.training) == wanted
        ]
        if rows is None and found:
            return max(found, key=lambda row: row.rows).path
        if rows is not None and (nearest := _nearest(found, rows)):
            return nearest.path
    return None


def _nearest(measured: Iterable[Row], rows: int) -> Row | None:
    """The row whose batch is the nearest by ratio, where it is near enough."""

    def ratio(row: Row) -> float:
        return max(row.rows, rows) / max(1, min(row.rows, rows))

    return min((row for row in measured if ratio(row) <= FARTHEST), key=ratio, default=None)


def _is_of_this_triton(table: Table) -> bool:
    return table.versions["triton"].split(".")[:2] == [str(number) for number in TRITON_VERSION]


def _known(row: Gemm, aligned: bool, device: Device) -> tuple[TileConfig, ...]:
    """The tiles that the rule here would measure for a row's product."""
    return layer_tiles.candidates(dataclasses.replace(row.problem, aligned=aligned), device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def user_path(device: str) -> Path:
    """Where a user's own table of a device lies."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(cache):  # as the specification has it: not set, empty or relative
        cache = os.path.expanduser("~/.cache")
    return Path(cache, "mlp_fused", f"{devices.device_slug(device)}.json")


def packaged_path(device: str) -> Path:
    """Where the table of a device lies that came with the package."""
    return PACKAGED / f"{devices.device_slug(device)}.json"


@functools.lru_cache(maxsize=64)
def related(device: Device) -> tuple[Table, ...]:
    """The packaged tables of related GPUs."""
    tables = []
    for path in sorted(PACKAGED.glob("*.json")):
        try:
            table = read(path)
        except ValueError:  # of which `measured` warns on its own GPU
            continue
        if table.is_related(device):
            tables.append(table)
    return tuple(tables)


@functools.lru_cache(maxsize=64)
def measured(device: Device) -> tuple[Table, ...]:
    """The tables of a device, the user's before the packaged one; what cannot be used is warned of and left out."""
    tables = [table for table in _first if table.device == device.name]
    for path, level in ((user_path(device.name), logging.WARNING), (packaged_path(device.name), logging.INFO)):
        try:
            table = _fitting(path, read(path), device, level)
        except FileNotFoundError:
            continue
        except ValueError as error:
            logger.warning("%s; it is not used; delete it, or let `mlp-fused tune` write a new one after that", error)
            continue
        if not _is_of_this_triton(table):
            then, today = table.versions["triton"], ".".join(map(str, TRITON_VERSION))
            logger.log(
                level,
                "%s was measured with Triton %s, this is %s: of its tiles only those are used that the rule here "
                "knows; `mlp-fused tune` measures anew",
                path,
                then,
                today,
            )
        tables.append(table)
    return tuple(tables)


def _fitting(path: Path, table: Table, device: Device, level: int) -> Table:
    """The table without the tiles that the device cannot run. Raises ValueError where it is another device's."""
    if devices.device_slug(table.device) != devices.device_slug(device.name):
        raise ValueError(f"{path} was measured on {table.device}; it needs to be of {device.name}")
    whys = [_why_unfit(row, device) for row in table.gemms]
    unfit = [f"gemms[{index}].tile {why}" for index, why in enumerate(whys) if why is not None]
    if unfit:
        rows = "this row is not used" if len(unfit) == 1 else f"this and {len(unfit) - 1} more rows are not used"
        logger.log(level, "%s: %s; %s; `mlp-fused tune` measures anew", path, unfit[0], rows)
    return dataclasses.replace(table, gemms=tuple(row for row, why in zip(table.gemms, whys) if why is None))


def _why_unfit(row: Gemm, device: Device) -> str | None:
    """Why a row's tile does not run on a device; None where it does."""
    if row.tile is None:
        return None
    if row.tile.warp_specialize and TRITON_VERSION < (3, 7):
        return "specialises warps; it needs Triton 3.7 or newer"
    needed = tile_config.shared_memory(row.problem, row.tile, device)
    if needed > device.shared_memory:
        return f"takes {needed} bytes of shared memory; {device.name} has {device.shared_memory}"
    return None


_first: tuple[Table, ...] = ()  # before those on disk


@contextlib.contextmanager
def asked_first(table: Table) -> Iterator[None]:
    """Within the block, `table` is asked before the others, as if it were on disk; see `forget` for both its ends."""
    global _first
    before, _first = _first, (table,)
    try:
        yield
    finally:
        _first = before


def forget() -> None:
    """Read the tables anew from now on: for after one was written."""
    for cache in (measured, related, choice_for, path_for):
        cache.cache_clear()


def merge(old: Table, new: Table) -> Table:
    """Both tables' rows; where both measured the same, `new`'s. Date and versions are `new`'s.

    Raises:
        ValueError: they are of different devices.
    """
    if old.device != new.device:
        raise ValueError(f"the old table was measured on {old.device}; it needs to be of {new.device}")
    return dataclasses.replace(
        new, gemms=_latest((*old.gemms, *new.gemms)), networks=_latest((*old.networks, *new.networks))
    )


def _latest(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Of rows about the same problem, the last, in the place of the first."""
    latest: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        latest[row.key] = row
    return tuple(latest.values())


# --- Files ---

# 0, "not used", for the one field that has none.
DEFAULTS = {
    field.name: 0 if field.default is dataclasses.MISSING else field.default for field in dataclasses.fields(TileConfig)
}


def write(path: Path, table: Table) -> None:
    """Write a table whole or not at all: whatever happens meanwhile, `path` holds the old one or the new one.

    Raises:
        OSError: it cannot be written.
        ValueError: `read` would refuse it.
    """
    text = _text(table)
    try:
        _table(json.loads(text))
    except _WrongError as error:
        raise ValueError(f"the table is no measured table: {error}") from None
    path = Path(path).resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # the bytes before the name: a crash must not leave an empty file under it
        os.chmod(temporary, 0o644)  # others may use it
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _text(table: Table) -> str:
    head = {"schema": SCHEMA, "device": table.device, "arch": table.arch, "multiprocessors": table.multiprocessors}
    head |= {"date": table.date, "versions": dict(table.versions)}
    lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    for name, rows in (("gemms", table.gemms), ("networks", table.networks)):
        body = ",\n".join("  " + json.dumps(_plain(row)) for row in rows)
        lines.append(f' "{name}": [\n{body}\n ]' + ("," if name == "gemms" else ""))
    return "\n".join(["{", *lines, "}", ""])


def _plain(row: Gemm | Network) -> dict[str, Any]:
    values = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    if isinstance(row, Network):
        return {**values, "ms": dict(row.ms)}
    if row.tile is not None:
        tile = dataclasses.asdict(row.tile)
        values["tile"] = {name: value for name, value in tile.items() if value != DEFAULTS[name]}
    return values


def read(path: Path) -> Table:
    """The table in a file, every value of it checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or is no table: one sentence with the file, the place in it, and what it needs.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"there is no file {path}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    try:
        return _table(content)
    except _WrongError as error:
        raise ValueError(f"{path} is no measured table: {error}") from None


class _WrongError(Exception):
    """What is wrong with a file, without its name."""


def _wrong(place: str, found: Any, need: str) -> _WrongError:
    shown = json.dumps(found)
    return _WrongError(f"{place} is {shown if len(shown) <= 80 else shown[:77] + '...'}; it needs to be {need}")


def _table(content: Any) -> Table:
    names = ("schema", "device", "arch", "multiprocessors", "date", "versions", "gemms", "networks")
    schema = content.get("schema", SCHEMA) if isinstance(content, dict) else SCHEMA
    if type(schema) is not int or schema not in READABLE:
        raise _wrong("schema", schema, " or ".join(map(str, READABLE)))
    if schema == 1:
        content = _of_schema_1(content)
    content = _object("the whole", content, names)
    device = _text_at("device", content["device"])
    if not devices.device_slug(device):
        raise _wrong("device", device, "a GPU's name")
    gemms = [_gemm(f"gemms[{index}]", row) for index, row in enumerate(_list("gemms", content["gemms"]))]
    networks = [_network(f"networks[{index}]", row) for index, row in enumerate(_list("networks", content["networks"]))]
    for name, rows in (("gemms", gemms), ("networks", networks)):
        seen: dict[tuple[Any, ...], int] = {}
        for index, key in enumerate(row.key for row in rows):
            if seen.setdefault(key, index) != index:
                raise _WrongError(
                    f"{name}[{index}] is about the same problem as {name}[{seen[key]}]; one row has to go"
                )
    date, found = _date(content["date"]), _versions(content["versions"])
    return Table(device, date, found, tuple(gemms), tuple(networks), *_size(content))


def _of_schema_1(content: dict[str, Any]) -> dict[str, Any]:
    """The same table as schema 2 has it, as far as it is one."""
    rows = content.get("gemms")
    if isinstance(rows, list):
        rows = [
            {**row, "activation": "identity" if row.get("kind") == "wgrad" else None} if isinstance(row, dict) else row
            for row in rows
        ]
        content = {**content, "gemms": rows}
    return {**content, "arch": None, "multiprocessors": None}


def _size(content: dict[str, Any]) -> tuple[int | str | None, int | None]:
    """Architecture and multiprocessors."""
    arch, count = content["arch"], content["multiprocessors"]
    if arch is not None and type(arch) is not int:
        arch = _text_at("arch", arch)
    return arch, None if count is None else _count("multiprocessors", count)


def _versions(value: Any) -> dict[str, str]:
    toolkit = [name for name in TOOLKITS if isinstance(value, dict) and name in value][:1] or ["cuda"]
    found = _object("versions", value, (*VERSIONS, *toolkit))
    return {name: _text_at(f"versions.{name}", version) for name, version in found.items()}


def _date(value: Any) -> str:
    text = _text_at("date", value)
    try:
        utc = datetime.datetime.fromisoformat(text).utcoffset() == datetime.timedelta()
    except ValueError:
        utc = False
    if not utc:
        raise _wrong("date", value, "ISO 8601 in UTC, such as 2026-01-31T12:00:00+00:00")
    return text


def _gemm(place: str, value: Any) -> Gemm:
    value = _object(place, value, tuple(field.name for field in dataclasses.fields(Gemm)))
    kind = _one_of(f"{place}.kind", value["kind"], KINDS)
    rows, width_out, width_in = (_count(f"{place}.{name}", value[name]) for name in ("rows", "width_out", "width_in"))
    dtype, precision = _arithmetic(place, value)
    activation = None if value["activation"] is None else _text_at(f"{place}.activation", value["activation"])
    tile = None if value["tile"] is None else _tile(f"{place}.tile", value["tile"], kind, dtype, precision)
    ms = None if tile is None and value["ms"] is None else _milliseconds(f"{place}.ms", value["ms"])
    torch_ms = _milliseconds(f"{place}.torch_ms", value["torch_ms"])
    return Gemm(kind, rows, width_out, width_in, dtype, precision, activation, tile, ms, torch_ms)


def _tile(place: str, value: Any, kind: str, dtype: str, precision: str) -> TileConfig:
    """A tile whose every field is one that the kernels of such a product can be launched with."""
    value = {**DEFAULTS, **_object(place, value, tuple(DEFAULTS), optional=True)}
    multiplied = ("ieee", "bf16x6") if (dtype, precision) == ("float32", "ieee") else (precision,)
    powers = {"block_m": (16, 256), "block_n": (16, 256), "block_k": (16, 256), "num_warps": (1, 16), "parts": (1, 4)}
    counts = {"group_m": 64, "num_stages": 8, "split": 2**16 if kind == "wgrad" else 1}
    for name, found in value.items():
        at = f"{place}.{name}"
        if name in powers:
            least, most = powers[name]
            if type(found) is not int or not least <= found <= most or found & (found - 1):
                raise _wrong(at, found, f"a power of two from {least} to {most}")
        elif name in counts:
            _count(at, found, most=counts[name])
        elif name == "programs":
            _count(at, found, least=0, most=2**20)
        elif name == "precision":
            _one_of(at, found, multiplied)
        elif type(found) is not bool:  # descriptors, early, warp_specialize
            raise _wrong(at, found, "true or false")
    if value["early"] and kind != "dgrad":
        raise _wrong(f"{place}.early", True, "false, but for dgrad")
    if value["block_n"] // value["parts"] < 16:
        raise _wrong(f"{place}.parts", value["parts"], "so few that each part has 16 columns or more")
    return TileConfig(**value)


def _network(place: str, value: Any) -> Network:
    value = _object(place, value, tuple(field.name for field in dataclasses.fields(Network)))
    widths = tuple(_count(f"{place}.widths", width) for width in _list(f"{place}.widths", value["widths"]))
    if len(widths) < 2:
        raise _wrong(f"{place}.widths", value["widths"], "two widths or more, of the input to the output")
    dtype, precision = _arithmetic(place, value)
    if type(value["training"]) is not bool:
        raise _wrong(f"{place}.training", value["training"], "true or false")
    paths = TRAINING_PATHS if value["training"] else INFERENCE_PATHS
    found = _object(f"{place}.ms", value["ms"], paths, optional=True)
    if not found:
        raise _wrong(f"{place}.ms", found, "the milliseconds of one path or more")
    return Network(
        widths,
        _count(f"{place}.rows", value["rows"]),
        dtype,
        precision,
        _text_at(f"{place}.activation", value["activation"]),
        value["training"],
        _one_of(f"{place}.path", value["path"], tuple(found)),
        {name: _milliseconds(f"{place}.ms.{name}", ms) for name, ms in found.items()},
    )


def _arithmetic(place: str, value: dict[str, Any]) -> tuple[str, str]:
    dtype = _one_of(f"{place}.dtype", value["dtype"], DTYPES)
    precisions = ("ieee", "tf32") if dtype == "float32" else ("ieee",)
    return dtype, _one_of(f"{place}.precision", value["precision"], precisions)


def _object(place: str, value: Any, names: tuple[str, ...], optional: bool = False) -> dict[str, Any]:
    """`value`, if it is an object with these names and no others; with `optional`, some of them."""
    if not isinstance(value, dict):
        raise _wrong(place, value, f"an object with the names {', '.join(names)}")
    if unknown := [name for name in value if name not in names]:
        raise _WrongError(f"{place} has {json.dumps(unknown[0])}, which nothing reads; it knows {', '.join(names)}")
    if not optional and (missing := [name for name in names if name not in value]):
        raise _WrongError(f"{place} has no {', no '.join(missing)}; it needs {', '.join(names)}")
    return value


def _list(place: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _wrong(place, value, "a list")
    return value


def _text_at(place: str, value: Any) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise _wrong(place, value, "a text of one line")
    return value


def _one_of(place: str, value: Any, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise _wrong(place, value, f"one of: {', '.join(choices)}")
    return value


def _count(place: str, value: Any, least: int = 1, most: int = 2**40) -> int:
    if type(value) is not int or not least <= value <= most:
        raise _wrong(place, value, f"{least}" if least == most else f"a whole number from {least} to {most}")
    return value


def _milliseconds(place: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e9:
        raise _wrong(place, value, "milliseconds, a number above 0")
    return float(value)
