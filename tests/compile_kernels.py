"""Compile the kernels ahead of time for GPUs that are not here, and read the machine code.

    python tests/compile_kernels.py [--networks] [--full] [--target NAME] [--json]

It runs in its own process, because nothing compiles under TRITON_INTERPRET=1. Each launcher is called with a function
that compiles instead of launching. So it compiles exactly the kernels that would be launched.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from machine_code import read_amdgcn, read_cubin

from mlp_fused import ACTIVATIONS
from mlp_fused.engine.autograd import run_network
from mlp_fused.engine.network_path import NetworkPath
from mlp_fused.engine.paths import network_path
from mlp_fused.kernels import (
    devices,
    layer_backward,
    layer_forward,
    layer_tiles,
    network_backward,
    network_forward,
    network_one_pass,
    network_tiles,
    partial_sums,
    plane_products,
    planes,
    tile_config,
)
from mlp_fused.kernels.devices import DEVICES, Device
from mlp_fused.kernels.dropout import Dropout
from mlp_fused.kernels.layer_tiles import choose
from mlp_fused.kernels.partial_sums import SUM_OF_MANY, SUM_OF_MORE, SUM_PARTIALS
from mlp_fused.kernels.tile_config import Problem, TileConfig

# One device for each architecture.
TARGETS = {name: DEVICES[name] for name in ("NVIDIA A100", "NVIDIA H100", "NVIDIA B200", "AMD MI300X")}
GEMMS = ("forward", "dgrad", "wgrad")
FORMS = ((torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee"))
REGISTERS = {"forward": "selu", "dgrad": "mish"}  # activations that need many registers
SPILL_LIMIT = 16  # the words that a thread may spill; the epilogue of the largest tile needs them


@dataclasses.dataclass(frozen=True)
class Compilation:
    """One kernel, tile and target."""

    kernel: str
    target: str
    dtype: str
    precision: str
    activation: str
    tile: TileConfig
    aligned: bool = True  # True if the rows of the tensors are 16-byte aligned
    dropout: bool = False
    shape: tuple[int, ...] = ()  # (width out, width in); given if one is 1, a constant to the compiler
    form: planes.Form | None = None  # of the kernel "split"
    splits: bool = False  # True if the epilogue of a product by planes splits its results

    @property
    def id(self) -> str:
        words = [self.kernel, self.target, self.dtype, self.precision, self.activation, str(self.tile)]
        words += [word for word, holds in (("unaligned", not self.aligned), ("dropout", self.dropout)) if holds]
        words += ["x".join(map(str, self.shape))] if self.shape else []
        words += [self.form.along, "own" if self.form.own else "block"] if self.form else []
        words += ["splits"] if self.splits else []
        return "-".join(words).replace(" ", "")


# The networks that are compiled without dx by default.
WITHOUT_DX = [((16, 64, 64, 16), "relu"), ((16, 64, 64, 16), "gelu"), ((64,) * 5, "relu"), ((128,) * 5, "relu")]


@dataclasses.dataclass(frozen=True)
class NetworkCompilation:
    """The kernels of one narrow network for one target: the training forward and the backward that the rule chooses."""

    target: str
    dtype: str
    precision: str
    activation: str
    widths: tuple[int, ...]
    input: str = ""  # the dtype of the input; if given, only the forward of inference is compiled
    dropout: bool = False  # after every layer
    needs_x: bool = True  # True if the gradient of the input is wanted

    @property
    def id(self) -> str:
        words = ["network", "x".join(map(str, self.widths)), self.target, self.dtype, self.precision, self.activation]
        words += [f"input_{self.input}"] if self.input else []
        words += ["dropout"] if self.dropout else []
        words += [] if self.needs_x else ["without_dx"]
        return "-".join(words).replace(" ", "")


def networks(full: bool) -> list[NetworkCompilation]:
    """List networks: widths 16 to 128 with 1, 3 and 5 hidden layers, wide inputs, narrow ends, and inputs to cast.

    By default, every other network in bf16 and some in fp32. With `full`, all combinations, in fp32 up to 3 layers.
    """
    rows: list[NetworkCompilation] = []
    square = [(width,) * (hidden + 2) for width in (16, 32, 64, 128) for hidden in (1, 3, 5)]
    others = [(784, 64, 64, 10), (784, 128, 128, 10), (784, 256, 10), (16, 64, 64, 16), (64,) * 8]
    # Networks with 6 and with 7 layers, 64 wide, differ little and compile slowly. The A100 leaves out the former, and
    # the B200 the latter.
    left_out = {("NVIDIA A100", (64,) * 7), ("NVIDIA B200", (64,) * 8)}
    for target, (dtype, precision) in itertools.product(TARGETS, FORMS):
        name = str(dtype).removeprefix("torch.")
        for turn, widths in enumerate([*square, *others]):
            if dtype.itemsize == 4 and len(widths) > 5:
                continue
            for activation in ("relu", "gelu"):
                wanted = dtype == torch.bfloat16 or (dtype == torch.float32 and widths == (64,) * 5)
                has_its_turn = (turn + list(TARGETS).index(target)) % 2 == 0 and (target, widths) not in left_out
                if full or (wanted and has_its_turn and activation == ("relu", "gelu")[turn // 2 % 2]):
                    rows.append(NetworkCompilation(target, name, precision, activation, widths))
        for widths, input_dtype in itertools.product(((64,) * 5, (784, 64, 64, 10)), ("uint8", "float16")):
            if dtype == torch.bfloat16 and (full or (target, len(widths)) == ("NVIDIA H100", 5)):
                rows.append(NetworkCompilation(target, name, precision, "relu", widths, input_dtype))
        if (dtype, precision, target) == (torch.float32, "ieee", "NVIDIA H100"):  # products of scaled parts
            listed = itertools.product(("fp16x3", "fp16x1"), (32, 64), ("relu", "gelu"))
            for turn, (split, width, activation) in enumerate(listed):
                if full or turn in (2, 3, 7):  # 64 wide
                    rows.append(NetworkCompilation(target, name, split, activation, (width,) * 5))
        if dtype == torch.bfloat16 and (full or target == "NVIDIA H100"):  # the tiles of inference
            for width, activation in ((16, "relu"), (32, "relu"), (64, "relu"), (64, "gelu")):
                rows.append(NetworkCompilation(target, name, precision, activation, (width,) * 5, name))
        if target == "NVIDIA H100" and dtype.itemsize == 2:  # without dx, the compiler arranges one pass differently
            listed = itertools.product([(16, 64, 64, 16), (16, 64, 64, 64, 16), *square], ("relu", "gelu"))
            for widths, activation in listed:
                if full or (dtype == torch.float16 and (widths, activation) in WITHOUT_DX):
                    rows.append(NetworkCompilation(target, name, precision, activation, widths, needs_x=False))
        # relu draws its mask once, gelu draws it again with z, and tanh saves z only because of Dropout.
        dropping = [*((width,) * 5 for width in (16, 32, 64, 128)), (16, 64, 64, 16), (784, 128, 128, 10)]
        for turn, (widths, activation) in enumerate(itertools.product(dropping, ("relu", "gelu", "tanh"))):
            if dtype.itemsize == 4 and (widths, precision) != ((64,) * 5, "ieee"):
                continue
            has_its_turn = turn % 4 == list(TARGETS).index(target)
            has_its_turn |= target == "NVIDIA H100" and widths == (64,) * 5
            if full or (dtype == torch.bfloat16 and has_its_turn):
                rows.append(NetworkCompilation(target, name, precision, activation, widths, dropout=True))
    return rows


def compile_network(row: NetworkCompilation) -> list[dict[str, Any]]:
    """A reading for each kernel, or the reason why the network takes the layer path.

    If the backend "triton" has another backward than "auto", the kernels of both are compiled.
    """
    device, dtype = TARGETS[row.target], getattr(torch, row.dtype)
    layers = len(row.widths) - 1
    activations = (ACTIVATIONS[row.activation],) * (layers - 1) + (ACTIVATIONS["identity"],)
    strides = tuple((k, 1, 1) for k in row.widths[:-1])
    readings = []
    backwards = set()
    dropouts = (0.1,) * layers if row.dropout else ()
    precision = network_tiles.SPLIT_ACCURACY.get(row.precision, row.precision)
    splits = None if precision == row.precision else (row.precision,)
    for torch_too in (True, False) if dtype.itemsize == 2 and not row.dropout else (False,):
        path = network_path(
            row.widths,
            strides,
            activations,
            dtype,
            precision,
            device,
            training=not row.input,
            dropouts=dropouts,
            torch_too=torch_too,
            splits=splits,
        )
        if isinstance(path, str):
            return [{"id": row.id, "kernel": "layer path", "reason": path}]
        if path.groups not in backwards:
            backwards.add(path.groups)
            readings += compile_path(row, path)
    return readings


def compile_path(row: NetworkCompilation, path: NetworkPath) -> list[dict[str, Any]]:
    """A reading for each kernel of a network path."""
    device, dtype = TARGETS[row.target], getattr(torch, row.dtype)
    rows = 2**20

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

    x, dy = tensor(rows, row.widths[0]).requires_grad_(row.needs_x), tensor(rows, row.widths[-1])
    weights = tuple(tensor(n, k) for k, n in itertools.pairwise(row.widths))
    biases = tuple(tensor(n) for n in row.widths[1:])

    def train() -> None:
        y = run_network(x, weights, biases, path)
        torch.autograd.grad(y, [*([x] if row.needs_x else []), *weights, *biases], dy)

    def infer() -> None:
        inference_x = torch.empty_like(x, dtype=getattr(torch, row.input))
        network_forward.network_forward(inference_x, weights, biases, dy.detach(), path.network, path.forward_tile)

    readings = []
    for launched in capture(infer if row.input else train, device):
        kind = launched.kernel.__name__.removeprefix("network_").removesuffix("_kernel")
        if kind == "one_pass":
            kind = "recompute" if path.formulation == "recompute" else "stored"
        reading = read(launched, device)
        tile = launched.tile
        counted = 0
        if kind in ("forward", "recompute", "stored", "dgrad"):
            problem = network_tiles.NetworkProblem(
                kind, path.network.pads, path.network.saves_z, dtype, path.network.precision, drops=path.drops
            )
            counted = network_tiles.network_shared_memory(problem, tile, device)
        threads = 32 * tile.num_warps * tile.programs // device.multiprocessors  # per multiprocessor
        readings.append(
            {"id": row.id, "kernel": kind, "tile": str(tile), "counted": counted, "threads": threads, **reading}
        )
    return readings


def compilations(full: bool) -> list[Compilation]:
    """Every kernel with every tile that is worth measuring; by default some of them, see `sample`.

    fp16 has the instructions of bf16, so it gets one tile for each target. Unaligned tensors get one of two
    activations.
    """
    rows: list[Compilation] = []
    products = itertools.product(TARGETS.items(), FORMS, (True, False), GEMMS)
    for turn, ((target, device), (dtype, precision), aligned, kind) in enumerate(products):
        if dtype == torch.float16 and (not aligned or kind != "forward"):
            continue
        listed = tiles(kind, dtype, precision, aligned, device)
        chosen = sample(listed, turn)
        if dtype == torch.float16:
            chosen = listed = chosen[-1:]
        elif not aligned:
            chosen = chosen[-1:] if kind == GEMMS[turn // 6 % 3] else []
        for tile in listed if full else chosen:
            in_turn = ("gelu", "relu")[(turn + listed.index(tile)) % 2]
            activations = ("relu", "gelu") if full and aligned else (in_turn,)
            for activation in ("identity",) if kind == "wgrad" else activations:
                rows.append(Compilation(kind, target, str(dtype)[6:], precision, activation, tile, aligned))
    for target, device in TARGETS.items():
        tile = choose(Problem("output_gradient", 4096, 1024, 0, torch.bfloat16), device)
        for kernel in ("output_gradient", "pointwise"):
            for dropout in (False, True):
                rows.append(Compilation(kernel, target, "bfloat16", "ieee", "gelu", tile, dropout=dropout))
        for kind in ("forward", "dgrad"):
            listed = tiles(kind, torch.bfloat16, "ieee", True, device)
            largest = {tile.warp_specialize: tile for tile in reversed(listed)}.values()
            for tile in listed if full else largest:
                for activation in ("relu", "gelu") if full else ("gelu",):
                    rows.append(Compilation(kind, target, "bfloat16", "ieee", activation, tile, dropout=True))
            most = max(listed, key=lambda tile: (tile.block_m * tile.block_n // tile.num_warps, -tile.num_warps))
            for tile in listed if full else [most] if target == "NVIDIA H100" else []:
                rows.append(Compilation(kind, target, "bfloat16", "ieee", REGISTERS[kind], tile))
        for kind in GEMMS if full or target == "NVIDIA H100" else ():
            m, n, k = (1, 1, 4096) if kind == "wgrad" else (4096, 1, 1)
            tile = dataclasses.replace(choose(Problem(kind, m, n, k, torch.bfloat16, aligned=False), device), split=1)
            activation = "identity" if kind == "wgrad" else "gelu"
            rows.append(Compilation(kind, target, "bfloat16", "ieee", activation, tile, False, shape=(1, 1)))
        for tile in (SUM_PARTIALS, SUM_OF_MORE, SUM_OF_MANY):
            rows.append(Compilation("sum_partials", target, "bfloat16", "ieee", "identity", tile))
        for form in itertools.starmap(planes.Form, itertools.product(("rows", "columns"), (False, True))):
            rows.append(Compilation("split", target, "float32", "ieee", "identity", planes.SPLIT, form=form))
        for kind, activation in (("forward", "gelu"), ("dgrad", "gelu"), ("dgrad", "relu"), ("wgrad", "identity")):
            tile = planes_tile(kind, target)
            for launched in (tile, planes.redo_tile(tile)):
                # For Blackwell, where planes are not used, Triton 3.7.1 fails on a "redo" that splits its results.
                is_block = (launched.block_m, launched.block_n) == (planes.SIDE, planes.SIDE)
                splits = kind != "wgrad" and is_block and target != "NVIDIA B200"
                if activation == "gelu" or kind == "wgrad":
                    rows.append(Compilation(kind, target, "float32", "ieee", activation, launched))
                if splits:
                    rows.append(Compilation(kind, target, "float32", "ieee", activation, launched, splits=True))
            if target == "NVIDIA H100" and activation != "relu":
                tile = planes_tile(kind, target, "tf32")
                rows.append(Compilation(kind, target, "float32", "tf32", activation, tile))
    return list(dict.fromkeys(rows))


def planes_tile(kind: tile_config.Kind, target: str, precision: str = "ieee") -> TileConfig:
    """The tile of planes on Hopper; on other targets, where planes are not used yet, one that fits."""
    problem = Problem(kind, 8192, 4096, 1024, torch.float32, precision)
    tile = layer_tiles.planes_tile(problem, DEVICES["NVIDIA H100"])
    assert tile is not None
    sizes = {
        "NVIDIA A100": {"block_m": 64, "block_k": 32},
        "NVIDIA B200": {"block_n": 64, "num_stages": 1, "parts": 2},
        "AMD MI300X": {"block_m": 64, "block_n": 64, "block_k": 32, "num_warps": 4, "num_stages": 1, "parts": 1},
    }
    return dataclasses.replace(tile, split=1, **sizes.get(target, {}))


def sample(tiles: list[TileConfig], turn: int) -> list[TileConfig]:
    """The largest tile for each precision, long side and kind of warps; and one more, chosen by `turn`."""

    def sides(tile: TileConfig) -> tuple[int, int]:
        return tile.block_m, tile.block_n

    def group(tile: TileConfig) -> tuple[Any, ...]:
        return tile.precision, tile.warp_specialize, max(sides(tile)) > 128 and sides(tile)

    largest = {group(tile): tile for tile in reversed(tiles)}
    shapes = list(dict.fromkeys(map(sides, tiles)))
    turned = [tile for tile in tiles if sides(tile) == shapes[turn % len(shapes)]]
    return list(dict.fromkeys([*largest.values(), turned[turn % len(turned)]]))


def tiles(
    kind: tile_config.Kind, dtype: torch.dtype, precision: str, aligned: bool, device: Device
) -> list[TileConfig]:
    """The distinct tiles worth measuring for large problems and for small sides, the largest tiles first."""
    sizes = [*itertools.product((16, 32, 8192), (16, 32, 64, 4096), (1024,)), (8192, 4096, 16)]
    problems = [Problem(kind, m, n, k, dtype, precision, aligned) for m, n, k in sizes]
    every = (tile for problem in problems for tile in layer_tiles.candidates(problem, device))
    listed = (tile for tile in every if tile.precision not in planes.PLANES)  # `planes_tile` has theirs
    distinct = dict.fromkeys(dataclasses.replace(tile, split=1, programs=0) for tile in listed)
    return sorted(distinct, key=lambda tile: (tile.block_m * tile.block_n, tile.block_k), reverse=True)


def compile_one(row: Compilation) -> dict[str, Any]:
    """Registers, spilled words, shared bytes and tensor-core instructions of one compilation."""
    device = TARGETS[row.target]
    reading = {"id": row.id, **read(capture(lambda: launch(row), device)[-1], device)}
    if row.kernel in GEMMS:
        problem = Problem(row.kernel, 1, 1, 1, getattr(torch, row.dtype), row.precision)
        reading["counted"] = tile_config.shared_memory(problem, row.tile, device)
    return reading


@dataclasses.dataclass(frozen=True)
class Launch:
    """The arguments of a launch."""

    kernel: Any
    tile: TileConfig
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


def capture(call: Callable[[], None], device: Device) -> list[Launch]:
    """The launches of a call on a device. They are recorded, not run."""
    launched: list[Launch] = []

    def record(
        kernel: Any, programs: int, device: Any, tile: TileConfig, tensors: Any, scalars: Any, **constants: Any
    ) -> None:
        launched.append(Launch(kernel, tile, (*tensors, *scalars), constants))

    modules = (
        layer_forward,
        layer_backward,
        network_forward,
        network_backward,
        network_one_pass,
        partial_sums,
        planes,
        plane_products,
    )
    before = [module.launch for module in modules]
    device_record = devices.device_record
    try:
        devices.device_record = lambda tensor: device
        for module in modules:
            module.launch = record
        call()
    finally:
        devices.device_record = device_record
        for module, launch in zip(modules, before):
            module.launch = launch
    return launched


def read(launched: Launch, device: Device) -> dict[str, Any]:
    """Compile a launch for a device and read the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    tile = launched.tile
    compiled = triton.compile(
        source(launched),
        target=GPUTarget(device.backend, device.arch, device.warp_size),
        options={"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )
    reading = read_cubin(compiled, tile.precision) if device.backend == "cuda" else read_amdgcn(compiled.asm["amdgcn"])
    return {"shared": compiled.metadata.shared, "shared_limit": device.shared_memory, **reading}


def source(launched: Launch) -> Any:
    """The source that a launch on a device would compile: the kernel and the types of its arguments."""
    from triton.compiler import ASTSource

    kernel, tile = launched.kernel, launched.tile
    names = kernel.arg_names
    signature: dict[str, Any] = {}
    constexprs, attributes = {}, {}
    values = {**dict(zip(names, launched.arguments)), **launched.constants}
    values |= {name: size for name, size in tile.constants.items() if name in names}

    def describe(value: Any, path: tuple[int, ...], free: bool) -> Any:
        if isinstance(value, tuple | list):
            return tuple(describe(element, (*path, index), free) for index, element in enumerate(value))
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int32": "i32", "int64": "i64"}
            short["uint8"] = "u8"
            return "*" + short[str(value.dtype)[6:]]
        if value is None or (value == 1 and not free):
            constexprs[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0 and not free:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32"

    for index, name in enumerate(names):
        parameter = kernel.params[index]
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            constexprs[(index,)] = values.get(name, parameter._param.default)
        else:
            signature[name] = describe(values[name], (index,), parameter.do_not_specialize)
    return ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)


def launch(row: Compilation) -> None:
    """Call the launcher with tensors that have shapes but no memory: M rows, N wide out, K wide in."""
    dtype, activation = getattr(torch, row.dtype), ACTIVATIONS[row.activation]
    M = 4096
    N, K = row.shape or ((1024, 1024) if row.aligned else (1001, 1001))

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, w, b, dz, z = tensor(M, K), tensor(N, K), tensor(N), tensor(M, N), tensor(M, K)
    saves_z, precision, tile = activation.saves_preactivation, row.precision, row.tile
    dropping: dict[str, Any] = {}

    if row.dropout:
        dropping = {"seed": torch.empty(1, dtype=torch.int64, device="meta"), "dropout": Dropout(0.9, 1)}
    if tile.precision in (*planes.PLANES, "redo"):
        launch_by_planes(row, M, N, K)
    elif row.kernel == "forward":
        z = tensor(M, N) if saves_z else None
        layer_forward.layer_forward(x, w, b, tensor(M, N), z, activation, precision, tile, **dropping)
    elif row.kernel == "dgrad":
        h = tensor(M, K) if saves_z else None
        layer_backward.dgrad(dz, w, z, tensor(M, K), h, activation, precision, tile, **dropping)
    elif row.kernel == "output_gradient":
        layer_backward.output_gradient(
            dz, tensor(M, N), tensor(M, N), activation, tile, tensor(M, N) if saves_z else None, **dropping
        )
    elif row.kernel == "pointwise":
        layer_forward.pointwise(tensor(M, N), tensor(M, N), activation, tile, **dropping)
    elif row.kernel == "split":
        assert row.form is not None
        sums = None if row.form.along == "rows" else tensor(planes.info_shape(M, K, row.form)[1], K)
        planes.split(x, *_split(x, row.form), sums, row.form)
    else:
        tile = tile if row.kernel == "wgrad" else TileConfig(64, 64, 64, 8)
        split = 4 if row.kernel == "sum_partials" else 1
        layer_backward.wgrad(dz, x, w, b, precision, dataclasses.replace(tile, split=split))


def launch_by_planes(row: Compilation, M: int, N: int, K: int) -> None:
    """Call the launcher of a product by planes, as `launch` does. "redo" reads planes too if the epilogue splits."""
    tile, activation = row.tile, ACTIVATIONS[row.activation]
    rows, own_rows, columns, own_columns = (
        planes.Form(along, own) for along, own in itertools.product(("rows", "columns"), (False, True))
    )

    def tensor(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    def operand(size: int, length: int, form: planes.Form) -> planes.Operand:
        split_planes, info = _split(tensor(size, length), form, planes.PLANES.get(tile.precision, 2))
        return (tensor(size, length) if tile.precision == "redo" and not row.splits else split_planes), info

    def result(width: int, form: planes.Form) -> planes.Operand:
        return _split(tensor(M, width), form)

    saves_z = activation.saves_preactivation
    if row.kernel == "forward":
        h, split = (None, result(N, rows)) if row.splits else (tensor(M, N), None)
        operands, z = (operand(M, K, rows), operand(N, K, rows)), tensor(M, N) if saves_z else None
        plane_products.forward_by_planes(*operands, tensor(N), h, z, activation, tile, split)
    elif row.kernel == "dgrad":
        operands, saved = (operand(M, N, own_rows), operand(N, K, columns)), tensor(M, K)
        h = tensor(M, K) if saves_z else None
        if row.splits:
            by_columns = (*result(K, own_columns), tensor(planes.info_shape(M, K, columns)[1], K))
            plane_products.dgrad_by_planes(*operands, saved, None, h, activation, tile, result(K, own_rows), by_columns)
        else:
            plane_products.dgrad_by_planes(*operands, saved, tensor(M, K), h, activation, tile)
    else:
        sums = layer_backward.wgrad_sums(M, tile, torch.float32, N * K, 0)
        operands = (operand(M, N, own_columns), operand(M, K, columns))
        plane_products.wgrad_by_planes(*operands, tensor(N, K), tile, sums)


def _split(whole: torch.Tensor, form: planes.Form, count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """The planes of a tensor and their info, without values."""
    shape, strides = planes.planes_shape(*whole.shape, count)
    split_planes = torch.empty_strided(shape, strides, dtype=torch.float16, device="meta")
    return split_planes, torch.empty(planes.info_shape(*whole.shape, form), dtype=torch.int32, device="meta")


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The lines of a table of all readings."""
    columns = (
        "registers",
        "spills",
        "shared",
        "counted",
        "wgmma",
        "waits",
        "instructions",
        "tcgen05",
        "mma",
        "mfma",
        "tma",
        "cp_async",
        "setmaxnreg",
        "to_16_bits",
        "with_relu",
    )
    names = [f"{row['id']} {row.get('kernel', '')} {row.get('tile', '')}".strip() for row in rows]
    width = max(map(len, names))
    yield "compiled".ljust(width) + "".join(column.rjust(12) for column in columns)
    for name, row in zip(names, rows):
        readings = "".join(str(row.get(column, "-")).rjust(12) for column in columns)
        yield name.ljust(width) + (f"   {row['reason']}" if "reason" in row else readings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--full", action="store_true", help="every kernel with every tile on every target")
    parser.add_argument("--json", action="store_true", help="a JSON object a line, instead of a table")
    parser.add_argument("--networks", action="store_true", help="narrow networks in one kernel, instead of layers")
    parser.add_argument("--target", choices=TARGETS, help="for one device only")
    options = parser.parse_args()

    def chosen(row: Compilation | NetworkCompilation) -> bool:
        return options.target in (None, row.target)

    with ProcessPoolExecutor(2) as pool:
        rows: list[dict[str, Any]] = []
        if options.networks:
            results = pool.map(compile_network, filter(chosen, networks(options.full)), chunksize=1)
        else:
            results = ([row] for row in pool.map(compile_one, filter(chosen, compilations(options.full)), chunksize=1))
        for readings in results:
            rows += readings
            if options.json:
                for reading in readings:
                    print(json.dumps(reading), flush=True)
    if not options.json:
        print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
