"""Files of measured tables and of readings: their format, and reading and writing them.

A file is one JSON object, one row a line:

    {"schema": 4, "device": "NVIDIA H200", "arch": 90, "multiprocessors": 132, "date": "2026-01-31T12:00:00+00:00",
     "versions": {"mlp_fused", "python", "torch", "triton", "cuda" or "hip", "driver": each a text},
     "gemms": [
      {"kind": "forward", "rows": 8192, "width_out": 4096, "width_in": 1024, "dtype": "bfloat16", "precision": "ieee",
       "activation": "gelu", "tile": {"block_m": 128, …}, "ms": 0.12, "torch_ms": 0.13, "kernel": "0f1e…",
       "planes_ms": null}, …],
     "networks": [
      {"widths": [64, 64, 64], "rows": 1048576, "dtype": "float16", "precision": "ieee", "activation": "relu",
       "training": true, "path": "recompute", "ms": {"recompute": 1.1, "stored": 1.4, "layer": 2.0, "torch": 3.0},
       "kernel": "2d3c…"}, …]}

arch        as in `Device`: 90, "gfx942"
kind        "forward", "dgrad" or "wgrad"
activation  the name of the activation in the epilogue: for forward the layer's own, for dgrad that of the layer below,
            for wgrad "identity"
dtype       "float16", "bfloat16" or "float32"
precision   the way float32 is multiplied: "ieee" or "tf32"; always "ieee" for the other dtypes
tile        the fields of `TileConfig` that differ from their defaults; null if torch's own product is faster
ms          milliseconds of our fastest tile, null if none ran; for a network, milliseconds of each measured path
torch_ms    milliseconds of torch's product
planes_ms   milliseconds of the product by fp16 planes and of the split of its operands; null if it was not measured,
            as in files of schema 1 to 3
path        the fastest path: "recompute", "stored", "layer" or "torch" in training, "network", "layer" or "torch" in
            inference
kernel      the digest of the sources of the measured kernels (row_kernels.py); null in files of schema 1 and 2

A file of readings (`mlp-fused tune --readings FILE`) has the same format, with `"readings": true` after the schema. It
has a row for every measured tile of a product, faster than torch or not: `tile` is that tile and `ms` its time. If no
tile of a product ran, it has one row without a tile. `bench.fit` reads tables and readings; paths and tiles are chosen
by tables alone.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..dtypes import DTYPES, dtype_name
from ..files import write_whole
from ..kernels import tile_config
from ..kernels.devices import Device, device_slug
from ..kernels.tile_config import Problem, TileConfig

__all__ = ["Gemm", "Network", "Table", "fastest", "read", "row_key", "write"]

SCHEMA = 4
READABLE = (1, 2, 3, 4)
KINDS = ("forward", "dgrad", "wgrad")
TRAINING_PATHS = ("recompute", "stored", "layer", "torch")
INFERENCE_PATHS = ("network", "layer", "torch")
TOOLKITS = ("cuda", "hip")
VERSIONS = ("mlp_fused", "python", "torch", "triton", "driver")  # and one of the toolkits


@dataclass(frozen=True)
class Gemm:
    """The measurement of one product.

    Attributes:
        tile: our fastest tile, or None if torch's product is faster. In readings, the measured tile.
        ms: milliseconds of our fastest tile; None if none ran.
        torch_ms: milliseconds of torch's product.
        activation: the name of the activation in the epilogue; None in a row of schema 1, which has no names.
        kernel: the digest of the kernel's source.
        planes_ms: milliseconds of the product by planes, with the split of its operands; None if it was not measured.
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
    kernel: str | None = None
    planes_ms: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """The fields that identify the product."""
        return self.kind, self.rows, self.width_out, self.width_in, self.dtype, self.precision, self.activation

    @property
    def problem(self) -> Problem:
        """The product, for `layer_tiles`."""
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
    """The measurement of one network: milliseconds of each path, and the fastest path."""

    widths: tuple[int, ...]
    rows: int
    dtype: str
    precision: str
    activation: str  # the name of the hidden layers' activation
    training: bool  # forward and backward; False for inference
    path: str
    ms: Mapping[str, float]
    kernel: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """The fields that identify the network and its batch."""
        return self.widths, self.rows, self.dtype, self.precision, self.activation, self.training


@dataclass(frozen=True)
class Table:
    """The measurements of one device, with their date and the versions of the software."""

    device: str
    date: str  # ISO 8601, UTC
    versions: Mapping[str, str]
    gemms: tuple[Gemm, ...] = ()
    networks: tuple[Network, ...] = ()
    arch: int | str | None = None  # None in schema 1
    multiprocessors: int | None = None
    readings: bool = False  # True if products have a row for every measured tile

    @property
    def rows(self) -> tuple[Gemm | Network, ...]:
        """All rows."""
        return (*self.gemms, *self.networks)

    def is_related(self, device: Device) -> bool:
        """True if the table is of another GPU, with the architecture and the number of multiprocessors of `device`."""
        is_other = device_slug(self.device) != device_slug(device.name)
        same = (self.arch, self.multiprocessors) == (device.arch, device.multiprocessors)
        return is_other and same and "MIG" not in self.device + device.name


# The defaults of TileConfig's fields. Fields without one get 0, which means "not used".
DEFAULTS = {
    field.name: 0 if field.default is dataclasses.MISSING else field.default for field in dataclasses.fields(TileConfig)
}


def row_key(row: Gemm | Network, table: Table) -> tuple[Any, ...]:
    """The key of a row, unique in its table. In readings it includes a product's tile."""
    return (*row.key, row.tile) if table.readings and isinstance(row, Gemm) else row.key


def fastest(readings: Iterable[Gemm]) -> tuple[Gemm, ...]:
    """The rows of a table, made from readings: for each product the fastest tile, or torch."""
    best: dict[tuple[Any, ...], Gemm] = {}
    planes_ms: dict[tuple[Any, ...], float | None] = {}
    for row in readings:
        planes_ms[row.key] = planes_ms.get(row.key) or row.planes_ms
        other = best.get(row.key)
        if other is None or (row.ms is not None and (other.ms is None or row.ms < other.ms)):
            best[row.key] = row
    rows = [dataclasses.replace(row, planes_ms=planes_ms[key]) for key, row in best.items()]
    return tuple(
        dataclasses.replace(row, tile=None) if row.ms is not None and row.ms >= row.torch_ms else row for row in rows
    )


def write(path: Path, table: Table) -> None:
    """Write a table, whole or not at all: if it fails, `path` still has the old one.

    Raises:
        OSError: the file cannot be written.
        ValueError: the table has a value that `read` would refuse.
    """
    text = _text(table)
    try:
        _parse(json.loads(text))
    except ValueError as error:
        raise ValueError(f"the table is not valid: {error}") from None
    Path(path).resolve().parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(text.encode()))


def _text(table: Table) -> str:
    head: dict[str, Any] = {"schema": SCHEMA, **({"readings": True} if table.readings else {})}
    head |= {"device": table.device, "arch": table.arch, "multiprocessors": table.multiprocessors}
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
    """Read a table from a file, and check every value.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read or is not a table; the message names the place in the file.
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
        return _parse(content)
    except ValueError as error:
        raise ValueError(f"{path} is not a measured table: {error}") from None


def _parse(content: Any) -> Table:
    """The table in a file's content. Raises ValueError with the place of a bad value."""
    if not isinstance(content, dict):
        raise ValueError("it is not an object")
    schema = content.get("schema")
    if type(schema) is not int or schema not in READABLE:
        raise ValueError(f"schema is {_shown(schema)}; it needs to be one of {', '.join(map(str, READABLE))}")
    content = {name: value for name, value in content.items() if name != "schema"}
    if schema == 1:
        content |= {"arch": None, "multiprocessors": None}
    table = _construct(Table, "the table", content)
    if missing := [name for name in ("gemms", "networks") if name not in content]:
        raise ValueError(f"the table has no {missing[0]}")
    _check(
        "",
        table,
        device=_is_text(table.device) and device_slug(table.device),
        date=_is_utc(table.date),
        arch=table.arch is None or type(table.arch) is int or _is_text(table.arch),
        multiprocessors=table.multiprocessors is None or _is_count(table.multiprocessors),
        versions=isinstance(table.versions, dict)
        and {*VERSIONS} <= table.versions.keys() <= {*VERSIONS, *TOOLKITS}
        and len(table.versions) == len(VERSIONS) + 1
        and all(map(_is_text, table.versions.values())),
        readings=type(table.readings) is bool,
        gemms=isinstance(table.gemms, list),
        networks=isinstance(table.networks, list),
    )
    gemms = [_gemm(f"gemms[{index}]", row, schema) for index, row in enumerate(table.gemms)]
    networks = [_network(f"networks[{index}]", row) for index, row in enumerate(table.networks)]
    for name, keys in (("gemms", [row_key(row, table) for row in gemms]), ("networks", [row.key for row in networks])):
        if len(set(keys)) < len(keys):
            raise ValueError(f"two rows of its {name} are for the same problem")
    return dataclasses.replace(table, gemms=tuple(gemms), networks=tuple(networks))


def _gemm(place: str, value: Any, schema: int) -> Gemm:
    if schema == 1 and isinstance(value, dict):
        value = {**value, "activation": "identity" if value.get("kind") == "wgrad" else None}
    row = _construct(Gemm, place, value)
    _check(
        place,
        row,
        kind=row.kind in KINDS,
        width_out=_is_count(row.width_out),
        width_in=_is_count(row.width_in),
        activation=row.activation is None or _is_text(row.activation),
        ms=_is_milliseconds(row.ms) or (row.tile is None and row.ms is None),
        torch_ms=_is_milliseconds(row.torch_ms),
        planes_ms=row.planes_ms is None or (row.dtype == "float32" and _is_milliseconds(row.planes_ms)),
        **_valid_shared_fields(row),
    )
    if row.tile is None:
        return row
    tile, place = _construct(TileConfig, f"{place}.tile", row.tile, DEFAULTS), f"{place}.tile"
    splits = {"ieee": ("bf16x6", "fp16x3"), "tf32": ("fp16x1",)} if row.dtype == "float32" else {}
    _check(
        place,
        tile,
        **{side: _is_power(getattr(tile, side), 16, 256) for side in ("block_m", "block_n", "block_k")},
        group_m=_is_count(tile.group_m, 1, 64),
        num_warps=_is_power(tile.num_warps, 1, 16),
        num_stages=_is_count(tile.num_stages, 1, 8),
        split=_is_count(tile.split, 1, 2**16 if row.kind == "wgrad" else 1),
        programs=_is_count(tile.programs, 0, 2**20),
        precision=tile.precision in (row.precision, *splits.get(row.precision, ())),
        parts=_is_power(tile.parts, 1, 4),
        descriptors=type(tile.descriptors) is bool,
        early=type(tile.early) is bool and (row.kind == "dgrad" or not tile.early),
        warp_specialize=type(tile.warp_specialize) is bool,
    )
    _check(place, tile, parts=tile.block_n // tile.parts >= 16)
    return dataclasses.replace(row, tile=tile)


def _network(place: str, value: Any) -> Network:
    row = _construct(Network, place, value)
    _check(place, row, training=type(row.training) is bool, ms=isinstance(row.ms, dict))
    known = TRAINING_PATHS if row.training else INFERENCE_PATHS
    _check(
        place,
        row,
        widths=type(row.widths) in (list, tuple) and len(row.widths) > 1 and all(map(_is_count, row.widths)),
        activation=_is_text(row.activation),
        ms=row.ms.keys() <= {*known} and all(map(_is_milliseconds, row.ms.values())),
        path=isinstance(row.path, str) and row.path in row.ms,
        **_valid_shared_fields(row),
    )
    return dataclasses.replace(row, widths=tuple(row.widths))


def _valid_shared_fields(row: Gemm | Network) -> dict[str, bool]:
    """The fields that rows of products and of networks share, by name: True if the value is valid."""
    precisions = ("ieee", "tf32") if row.dtype == "float32" else ("ieee",)
    return {
        "rows": _is_count(row.rows),
        "dtype": row.dtype in map(dtype_name, DTYPES.values()),
        "precision": row.precision in precisions,
        "kernel": row.kernel is None or _is_text(row.kernel),
    }


Fields = TypeVar("Fields", Table, Gemm, Network, TileConfig)


def _construct(kind: type[Fields], place: str, value: Any, defaults: Mapping[str, Any] | None = None) -> Fields:
    """Make a dataclass from an object of the file. Raises ValueError if its names are not the dataclass's fields."""
    if not isinstance(value, dict):
        raise ValueError(f"{place} is {_shown(value)}, which is not an object")
    values = {**(defaults or {}), **value}
    fields = dataclasses.fields(kind)
    unknown = values.keys() - {field.name for field in fields}
    if unknown:
        raise ValueError(f"{place} has an unknown field {_shown(min(unknown))}")
    required = (field.name for field in fields if field.default is dataclasses.MISSING)
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"{place} has no {missing[0]}")
    return kind(**values)


def _check(place: str, row: Any, **valid: object) -> None:
    """Raise ValueError for the first field that is not valid. `valid` has a truth value for each field."""
    for name, is_valid in valid.items():
        if not is_valid:
            where = f"{place}.{name}" if place else name
            raise ValueError(f"{where} is {_shown(getattr(row, name))}, which is not a valid value")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_count(value: Any, least: int = 1, most: int = 2**40) -> bool:
    return type(value) is int and least <= value <= most


def _is_power(value: Any, least: int, most: int) -> bool:
    return _is_count(value, least, most) and value & (value - 1) == 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and value.isprintable()


def _is_milliseconds(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e9


def _is_utc(value: Any) -> bool:
    try:
        return datetime.datetime.fromisoformat(value).utcoffset() == datetime.timedelta()
    except (TypeError, ValueError):
        return False
