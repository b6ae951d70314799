"""Tiles of the network kernels, compared with the readings that they were chosen by."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from narrow_readings import NETWORKS, forwards

from mlp_fused import ACTIVATIONS
from mlp_fused.kernels.devices import DEVICES, Device
from mlp_fused.kernels.network_tiles import (
    NetworkProblem,
    network_shared_memory,
    network_tile,
    padded,
    rounds_with_relu,
)
from mlp_fused.kernels.tile_config import TileConfig

H100 = DEVICES["NVIDIA H100"]


def forward(
    widths: tuple[int, ...], activation: str = "relu", dtype: str = "bfloat16", device: Device = H100, **others: int
) -> TileConfig:
    saves_z = (ACTIVATIONS[activation].saves_preactivation,) * (len(widths) - 2) + (False,)
    problem = NetworkProblem("forward", tuple(map(padded, widths)), saves_z, getattr(torch, dtype), **others)
    tile = network_tile(problem, device)
    assert isinstance(tile, TileConfig)
    assert network_shared_memory(problem, tile, device) <= device.shared_memory
    return tile


def per_multiprocessor(tile: TileConfig) -> TileConfig:
    assert tile.programs % H100.multiprocessors == 0
    return dataclasses.replace(tile, programs=tile.programs // H100.multiprocessors)


@pytest.mark.parametrize("name", NETWORKS)
def test_inference_uses_the_fastest_measured_tile(name: str) -> None:
    read = {reading.tile: reading.us for reading in forwards() if reading.network == name}
    assert len(read) > 5
    assert per_multiprocessor(forward(*NETWORKS[name][:1], NETWORKS[name][2])) == min(read, key=lambda tile: read[tile])


@pytest.mark.parametrize("width", [16, 32, 64])
def test_a_storing_forward_uses_two_stages_and_two_programs(width: int) -> None:
    """At a width of 64, a forward that saves took 0.2761 ms with the tile of inference and 0.2522 ms with this one."""
    assert per_multiprocessor(forward((width,) * 5, stores=True)) == TileConfig(
        128, num_warps=8, num_stages=2, programs=2
    )


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_only_nvidia_gpus_round_to_16_bits_with_relu(device: Device) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        assert rounds_with_relu(dtype, device) == (device.backend == "cuda" and dtype.itemsize == 2)


def test_no_more_programs_start_than_fit_in_shared_memory() -> None:
    for layers, programs in ((4, 3), (8, 2), (16, 1)):
        tile = per_multiprocessor(forward((64,) * (layers + 1)))
        assert (tile.num_stages, tile.programs) == (1, programs)


@pytest.mark.parametrize(
    "others",
    [
        {"widths": (16, 64, 64, 16)},
        {"widths": (128,) * 5},
        {"dtype": "float32"},
        {"input_size": 4},
        {"device": DEVICES["NVIDIA A100"]},
        {"device": DEVICES["NVIDIA B200"]},
    ],
    ids=["narrow input", "128 wide", "float32", "a float32 input under autocast", "Ampere", "Blackwell"],
)
def test_networks_without_a_reading_have_one_tile_for_training_and_inference(others: dict[str, object]) -> None:
    problem = {"widths": (64,) * 5, **others}
    assert forward(**problem) == forward(**problem, stores=True)
