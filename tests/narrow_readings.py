"""The times of kernels of narrow networks, by tile, from tests/data/h100/narrow.log and h200/narrow_float32.jsonl."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlp_fused.kernels.tile_config import TileConfig

LOG = Path(__file__).with_name("data") / "h100" / "narrow.log"
FLOAT32 = Path(__file__).with_name("data") / "h200" / "narrow_float32.jsonl"
NETWORKS = {  # widths, dtype, activation
    "n16": ((16,) * 5, "bfloat16", "relu"),
    "n32": ((32,) * 5, "bfloat16", "relu"),
    "n64": ((64,) * 5, "bfloat16", "relu"),
    "g64": ((64,) * 5, "bfloat16", "gelu"),
}


@dataclass(frozen=True)
class Forward:
    """The microseconds of a forward over 2^20 rows, with a tile and a number of programs per multiprocessor."""

    network: str
    tile: TileConfig  # `programs` is the number on one multiprocessor
    us: float


@dataclass(frozen=True)
class Sum:
    """The microseconds of adding (splits, columns) partial sums."""

    splits: int
    columns: int
    tile: TileConfig
    us: float


def forwards(text: str | None = None) -> Iterator[Forward]:
    """Forwards that store nothing."""
    for line in (LOG.read_text() if text is None else text).splitlines():
        match = re.match(r"(\w+) +forward +m(\d+) w(\d+) s(\d+) ", line)
        if not match or match[1] not in NETWORKS:
            continue
        rows, warps, stages = map(int, match.groups()[1:])
        for programs, ms in re.findall(r"x(\d+) (\d+\.\d+)", line.partition(" err ")[2]):
            tile = TileConfig(rows, num_warps=warps, num_stages=stages, programs=int(programs))
            yield Forward(match[1], tile, 1e3 * float(ms))


def sums() -> Iterator[Sum]:
    for line in LOG.read_text().splitlines():
        match = re.match(r"n32 +sum +sum (\d+)x(\d+) w(\d+) ", line)
        if not match:
            continue
        block_m, block_k, warps = map(int, match.groups())
        tile = TileConfig(block_m, block_k=block_k, num_warps=warps)
        for splits, columns, us in re.findall(r"(\d+)x(\d+): ([\d.]+) us", line):
            yield Sum(int(splits), int(columns), tile, float(us))


def scaled_ms(width: int, forward: TileConfig, dgrad: TileConfig | None, wgrad: TileConfig) -> tuple[float, float]:
    """Our milliseconds with fp16x3, and torch's, for four relu layers in full fp32 on an H200.

    They are for a forward and a backward, or for a forward alone if `dgrad` is None.
    """
    readings = [json.loads(line) for line in FLOAT32.read_text().splitlines()]
    ms = {reading["timed"]: reading["ms"] for reading in readings if "timed" in reading}

    def kernel(kind: str, rows: int, tile: TileConfig) -> float:
        name = f"W{width} relu {kind} fp16x3 m{rows} w{tile.num_warps} s{tile.num_stages} x{tile.programs // 132}"
        return float(ms[name])

    if dgrad is None:
        return kernel("forward", forward.block_m, forward), ms[f"W{width} relu forward eager"]
    both = kernel("dgrad", dgrad.block_m, dgrad) + kernel("wgrad", wgrad.block_k, wgrad)
    return kernel("keeping", forward.block_m, forward) + both, ms[f"W{width} relu train eager"]
