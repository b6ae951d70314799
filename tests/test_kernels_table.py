"""The kernels against float64 over the table of cases, and tests of exactness and of bit-identical repetition."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from cases import CASES, Case, Data, check, gradients, make, oracle
from kernel_runs import PATHS, by_torch, case_id, find, forward
from torch import Tensor

from mlp_fused import ACTIVATIONS, mlp, reference
from mlp_fused.engine import autograd, layer_path, tables
from mlp_fused.engine.autograd import run_layers
from mlp_fused.engine.calls import run_kernels
from mlp_fused.engine.network_path import NetworkPath
from mlp_fused.engine.paths import find_layers
from mlp_fused.kernels import network, network_forward, network_one_pass
from mlp_fused.kernels.activations import IDENTITY
from mlp_fused.kernels.devices import Device, describe
from mlp_fused.kernels.dropout import draw_seed
from mlp_fused.kernels.launch import cdiv, count_launches, offset_type
from mlp_fused.kernels.layer_backward import dgrad, wgrad
from mlp_fused.kernels.layer_forward import layer_forward
from mlp_fused.kernels.layer_tiles import choose
from mlp_fused.kernels.tile_config import Problem, TileConfig
from mlp_fused.reference import Layer


def paths(case: Case) -> list[str]:
    """The paths that can run a case, as not every width fits in one kernel."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
    narrow = isinstance(find(case, make(replace(case, rows=3)))[2], NetworkPath)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    return ["layer", "network"] if narrow else ["layer"]


def marked(path: str, case: Case) -> object:
    """The parameters of a test with the tiles that are chosen without a measured table.

    The layer path runs them only on a GPU or with `-m full`. In the interpreter, other tests run every kind of tile.
    """
    return rotated(path, case, path, marks=pytest.mark.full("cpu") if path == "layer" else ())


# Small tiles of every kind that the layer kernels have, so that most cases need several.
KINDS = {
    "pointers": TileConfig(64, 64, 32, group_m=2, parts=4),
    "persistent": TileConfig(32, 32, 32, group_m=1, programs=3, split=2, descriptors=True, parts=2, early=True),
    "bf16x6": TileConfig(32, 32, 32, group_m=4, programs=5, descriptors=True, precision="bf16x6"),
}


def pick_tile(kind: str, problem: Problem) -> TileConfig:
    """The tile of a kind for a problem: with pointers if descriptors are impossible, and split only for wgrad."""
    tile = KINDS[kind]
    return replace(
        tile,
        precision=problem.precision if tile.precision == "ieee" else tile.precision,
        descriptors=tile.descriptors and problem.aligned,
        early=tile.early and problem.kind == "dgrad",
        split=tile.split if problem.kind == "wgrad" else 1,
    )


def kinds(case: Case) -> list[str]:
    """The kinds of tile for the layers of a case. bf16x6 is for full fp32 alone."""
    return ["pointers", "bf16x6"] if case.dtype == torch.float32 and not case.tf32 else ["pointers"]


# A case that differs from others only in its activation takes a quarter of a second with every kind of tile and path.
# By default each such case runs with one of them, in rotation. `-m full` runs all combinations.
TURNS = {
    "layer": (torch.float16,),
    "pointers": (torch.float32,),
    "persistent": (torch.float16,),
    "network": (torch.bfloat16,),
    "bf16x6": (),
}


def rotated(kind: str, case: Case, *others: object, marks: object = ()) -> object:
    """The parameters of a test, marked `full` unless the rotation selects them, and then with `marks`."""
    plain = Case(
        activation=case.activation,
        output_activation=case.output_activation,
        widths=(20, 17) if case.output_activation != "identity" else Case.widths,
        dtype=case.dtype,
        parameters=case.parameters,
    )
    deferred = case == plain and case.dtype not in TURNS[kind]
    return pytest.param(*others, case, marks=pytest.mark.full if deferred else marks)


@pytest.mark.parametrize(
    ("kind", "case"), [rotated(kind, case, kind) for case in CASES for kind in kinds(case)], ids=case_id
)
def test_every_kind_of_tile_through_the_table(
    kind: str, case: Case, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This runs in the interpreter. On a GPU, compiling every kind of tile would take an hour.

    There, `test_forward_and_gradients` runs the tiles that are chosen.
    """
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
    layer_path.layer_path.cache_clear()  # it caches paths with other tiles
    monkeypatch.setattr(tables, "choice_for", lambda problem, device: tables.Choice(pick_tile(kind, problem), "a test"))
    data = make(case)
    ours = gradients(data, forward(case, data, "layer"))
    layer_path.layer_path.cache_clear()
    check(case, oracle(case, data), ours, by_torch(case, data))


UNALIGNED = ("sliced", "strided parameters")  # layouts of tensors that do not begin at 16 bytes


@pytest.mark.parametrize(
    "case", [rotated("persistent", case) for case in CASES if case.layout not in UNALIGNED], ids=case_id
)
def test_all_layers_at_once_through_the_table(
    case: Case, device: str, by_pointers: None, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run persistent tiles twice. The second call fills pointers into the prepared launches."""
    all_layers_at_once(case, device, monkeypatch)


@pytest.mark.parametrize("case", [case for case in CASES if case.layout in UNALIGNED], ids=case_id)
def test_all_layers_at_once_without_alignment(
    case: Case, device: str, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_layers_at_once(case, device, monkeypatch)


def all_layers_at_once(case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
    layer_path.layer_path.cache_clear()
    monkeypatch.setattr(
        tables, "choice_for", lambda problem, device: tables.Choice(pick_tile("persistent", problem), "a test")
    )
    for _ in range(2):
        data = make(case, device)
        with count_launches() as launches:
            ours = gradients(data, forward(case, data, "run"))
    layer_path.layer_path.cache_clear()
    assert launches or case.rows == 0
    check(case, oracle(case, data), ours, by_torch(case, data))


@pytest.mark.parametrize(("path", "case"), [marked(path, case) for case in CASES for path in paths(case)], ids=case_id)
def test_forward_and_gradients(path: str, case: Case, device: str, poisoned: None) -> None:
    if case.tf32 and path == "network" and device == "cpu":
        pytest.skip("a CPU has no tf32 to compare with fp16x1; test_network_scaled.py has its bound")
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
    data = make(case, device)
    with count_launches() as launches:
        ours = gradients(data, forward(case, data, path))
    assert case.rows == 0 or any(name.startswith("network") for name in launches) == (path == "network")
    check(case, oracle(case, data), ours, by_torch(case, data))


# Integers below 2^p, and their products and sums below it, are exact: p is 8 in bf16, 11 in fp16, 24 in fp32.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("activation", ["identity", "relu", "step"])
@pytest.mark.parametrize("path", PATHS)
def test_exact_on_integers(path: str, activation: str, dtype: torch.dtype, device: str, poisoned: None) -> None:
    generator = torch.Generator().manual_seed(1)
    case = Case(37, (19, 5, 3), dtype, activation)

    def integers(*shape: int, sparsity: float = 0.8) -> Tensor:
        values = torch.randint(-1, 2, shape, generator=generator) * (torch.rand(shape, generator=generator) > sparsity)
        return values.to(dtype).to(device)

    data = Data(integers(37, 19), [integers(5, 19), integers(3, 5)], [integers(5), integers(3)], integers(37, 3))
    for leaf in data.leaves.values():
        leaf.requires_grad_()
    truth = oracle(case, data)
    assert max(value.abs().max() for value in truth.values.values()) < 2**8
    for name, actual in gradients(data, forward(case, data, path)).items():
        assert torch.equal(actual.double(), truth.values[name]), name


@pytest.mark.parametrize("recompute", [None, True, False], ids="recompute={}".format)
@pytest.mark.parametrize("path", PATHS)
def test_every_run_gives_the_same_bits(path: str, recompute: bool | None, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(1100, (40, 50, 20), dtype, "gelu")  # more rows than the programs process at once
        twins = (make(case, device), make(case, device))
        runs = [gradients(data, forward(case, data, path, recompute)) for data in twins]
        for name in runs[0]:
            assert torch.equal(runs[0][name], runs[1][name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_backward_recomputes_the_bits_of_the_forward(dtype: torch.dtype, device: str, poisoned: None) -> None:
    """h = a(round(z)) has the same bits in training, in inference, and recomputed by dgrad."""
    gelu = ACTIVATIONS["gelu"]
    x, weight, dz = (torch.randn(*shape, device=device).to(dtype) for shape in ((70, 40), (33, 40), (70, 33)))
    h, z, again = (torch.empty((70, 33), dtype=dtype, device=device) for _ in range(3))
    layer_forward(x, weight, None, h, z, gelu, "ieee")
    layer_forward(x, weight, None, again, None, gelu, "ieee")
    assert torch.equal(h, again)
    dx, rebuilt = torch.empty_like(h), torch.empty_like(h)
    dgrad(dz, torch.eye(33, dtype=dtype, device=device), z, dx, rebuilt, gelu, "ieee")
    assert torch.equal(h, rebuilt)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "sigmoid"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids="dropout={}".format)
def test_the_network_recomputes_the_bits_of_its_forward(
    dropout: float, activation: str, dtype: torch.dtype, device: str, poisoned: None
) -> None:
    case = Case(100, (20, 32, 24, 17), dtype, activation, dropout=dropout)
    data = make(case, device)
    x, layers, path = find(case, data)
    assert isinstance(path, NetworkPath)
    assert path.formulation == "recompute"
    assert path.backward_tile is not None
    weights, biases, *_ = zip(*layers)
    net = path.network
    y, dy = torch.empty_like(data.dy), data.dy
    hidden, again = (torch.empty(case.rows * net.starts[-1], dtype=dtype, device=device) for _ in range(2))
    # The interpreter multiplies with numpy, whose last bit depends on the number of rows.
    tile = path.forward_tile if device == "cuda" else path.backward_tile
    seed = {"seed": draw_seed(x.device), "keeps": path.keeps} if dropout else {}
    network_forward.network_forward(x, weights, biases, y, net, tile, h=hidden, **seed)
    nothing = network.make_gradients(net.widths, (False,) * 3, (False,) * 3, True)
    sums = network_one_pass.network_one_pass_sums(x.shape[0], net, nothing, path.backward_tile)
    partial, *_ = sums.allocate(x.device)
    dx = torch.empty_like(x)
    network_one_pass.network_one_pass(
        x, dy, weights, biases, None, None, None, dx, partial, net, nothing, path.backward_tile, h=again, **seed
    )
    assert not hidden.isnan().any()
    assert torch.equal(hidden, again)


@pytest.mark.parametrize("input_dtype", [torch.uint8, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [20, 300], ids=["held", "streamed"])
def test_a_network_casts_its_input_in_the_kernel(
    width: int, dtype: torch.dtype, input_dtype: torch.dtype, device: str, poisoned: None
) -> None:
    """The result is that of a cast by torch. On a GPU, the input may also lie in the host's pinned memory."""
    case = Case(100, (width, 32, 17), dtype)
    data = make(case, device)
    _, layers, path = find(case, data)
    assert isinstance(path, NetworkPath)
    assert (path.forward_tile.block_k > 0) == (width == 300)
    weights, biases, *_ = zip(*layers)
    random = torch.randn(case.rows, width, dtype=torch.float64)
    x = random.abs().mul(80).clamp(max=255).to(input_dtype) if input_dtype == torch.uint8 else random.to(input_dtype)

    def through(x: Tensor) -> Tensor:
        y = torch.empty_like(data.dy)
        network_forward.network_forward(x, weights, biases, y, path.network, path.forward_tile)
        return y

    expected = through(x.to(device, dtype))
    assert expected.isfinite().all()
    for placed in (x.to(device), x.pin_memory()) if device == "cuda" else (x,):
        torch.testing.assert_close(through(placed), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradcheck(name: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(Case(3, (2, 3, 2), torch.float64, name, name if name != "exp" else "identity"), seed=3)
    activations = Case(activation=name, output_activation=name if name != "exp" else "identity").activations
    leaves = tuple(data.leaves.values())

    def through_kernels(x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
        return mlp(x, [w0, w1], [b0, b1], *activations, backend="triton")

    def through_torch(x: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
        return mlp(x, [w0, w1], [b0, b1], *activations, backend="reference")

    def layer_by_layer(*leaves: Tensor) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(autograd, "LAUNCH_BOUND", -1)
            return through_kernels(*leaves)

    for function in (through_kernels, through_torch, *([layer_by_layer] if path == "layer" else [])):
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        if name == "hardsigmoid" and function is through_torch:
            with pytest.raises(RuntimeError, match="hardsigmoid_backward is not implemented"):  # torch's own limit
                torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
        else:
            assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("path", PATHS)
def test_second_derivatives_equal_torchs(path: str, device: str) -> None:
    for activation, needs in itertools.product(
        ("tanh", "gelu", "identity"), ("everything", "parameters", "last layer")
    ):
        case = Case(activation=activation, output_activation="softplus", needs=needs)
        data = make(case, device)
        twin = data.to(torch.float32)
        derivatives = []
        for tensors, y in (
            (data, forward(case, data, path)),
            (twin, reference.mlp(twin.x, twin.weights, twin.biases, case.activations)),
        ):
            leaves = [leaf for leaf in tensors.leaves.values() if leaf.requires_grad]
            first = torch.autograd.grad(y, leaves, tensors.dy, create_graph=True)
            penalty = sum(gradient.square().sum() for gradient in first)
            derivatives.append(torch.autograd.grad(penalty, leaves, allow_unused=True))
        for ours, torchs in zip(*derivatives):
            torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", ["run", "network"])
def test_second_derivatives_refuse_changed_parameters(path: str, device: str) -> None:
    """Second derivatives recompute from x. An ordinary gradient reads no bias and is still correct."""
    data = make(Case(), device)
    y = forward(Case(), data, path)
    with torch.no_grad():
        data.biases[0].add_(1)
    expected = torch.autograd.grad(y, data.weights, data.dy, retain_graph=True)
    assert all(gradient.isfinite().all() for gradient in expected)
    with pytest.raises(
        RuntimeError, match=r"inplace operation: bias\[0\] is at version 1; the forward computed with version 0"
    ):
        torch.autograd.grad(y, data.weights, data.dy, create_graph=True)


@pytest.mark.parametrize("path", ["layer", "run"])
def test_an_input_that_no_gradient_needs_may_change(path: str, device: str) -> None:
    """x is not saved if the first weight is frozen and x needs no gradient, as in torch.nn.Linear."""
    case = Case(widths=(8, 8, 8), activation="tanh", needs="last layer")
    data = make(case, device)
    y = forward(case, data, path)
    leaves = [leaf for leaf in data.leaves.values() if leaf.requires_grad]
    expected = torch.autograd.grad(y, leaves, data.dy, retain_graph=True)
    data.x.zero_()
    actual = torch.autograd.grad(y, leaves, data.dy, create_graph=True)
    for ours, before in zip(actual, expected):
        torch.testing.assert_close(ours, before)


TILES = [
    TileConfig(*tile, group_m=group)
    for tile, group in zip(itertools.product((16, 64), (16, 32), (16, 64)), (1, 2, 8) * 3)
]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (65, 33, 40)], ids=str)
def test_every_tile_agrees_with_torch(
    tile: TileConfig, sizes: tuple[int, int, int], device: str, poisoned: None
) -> None:
    M, N, K = sizes
    gelu = ACTIVATIONS["gelu"]
    x, weight, bias, dz = (torch.randn(*shape, device=device) for shape in ((M, K), (N, K), (N,), (M, N)))
    z, h = torch.empty((M, N), device=device), torch.empty((M, N), device=device)
    layer_forward(x, weight, bias, h, z, gelu, "ieee", tile)
    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(z, x @ weight.t() + bias, **close)
    torch.testing.assert_close(h, gelu(z), **close)

    dx, rebuilt = torch.empty((M, K), device=device), torch.empty((M, K), device=device)
    dgrad(dz, weight, x, dx, rebuilt, gelu, "ieee", tile)
    leaf = x.clone().requires_grad_()
    torch.testing.assert_close(rebuilt, gelu(x), **close)
    torch.testing.assert_close(dx, torch.autograd.grad(gelu(leaf), leaf, dz @ weight)[0], **close)

    for split in (1, 2, 5):
        split_tile = TileConfig(tile.block_m, tile.block_n, tile.block_k, tile.group_m, split=split)
        dw, db = torch.empty((N, K), device=device), torch.empty((N,), device=device)
        with count_launches() as launches:
            wgrad(dz, x, dw, db, "ieee", split_tile)
        assert ("sum_partials_kernel" in launches) == (min(split, -(-M // tile.block_k)) > 1)
        torch.testing.assert_close(dw, dz.t() @ x, **close)
        torch.testing.assert_close(db, dz.sum(0), **close)
        for only_w, only_b in ((dw, None), (None, db)):
            expected = only_w.clone() if only_w is not None else only_b.clone()
            wgrad(dz, x if only_w is not None else None, only_w, only_b, "ieee", split_tile)
            actual = only_w if only_w is not None else only_b
            torch.testing.assert_close(actual, expected, **close)


@pytest.mark.alone
def test_offsets_beyond_32_bits(device: str, path: str) -> None:
    """The two rows are 2^31 elements apart. The memory between them is never touched."""
    gap = 2**31 + 8
    storage = torch.empty(gap + 32, dtype=torch.bfloat16, device=device)
    x = storage.as_strided((2, 32), (gap, 1))
    x.copy_(torch.randn(2, 32))
    weight = torch.randn(16, 32, dtype=torch.bfloat16, device=device)
    assert offset_type(x, weight) is not offset_type(weight)
    y = mlp(x, [weight], None, backend="triton")
    assert torch.equal(y, mlp(x.clone(), [weight], None, backend="triton"))
    # The elements of a reduction are far apart, as in a gradient of a transposed layout.
    grown = storage.as_strided((32, 2), (1, gap))
    dw = torch.empty((2, 16), device=device)
    wgrad(grown, torch.ones((32, 16), dtype=torch.bfloat16, device=device), dw, None, "ieee")
    torch.testing.assert_close(dw, x.float().sum(1, keepdim=True).expand(2, 16))


def test_gradients_that_are_not_plain_tensors(device: str, path: str) -> None:
    """Try a lazily negated dy, a sparse dy, a batch of dy, and lazily negated weights."""
    weight = torch.randn(4, 20, device=device, requires_grad=True)
    x, w = torch.randn(9, 20, device=device), torch.randn(9, 4, device=device)
    negative = torch.complex(w, w).detach().conj().imag
    batch = torch.randn(3, 9, 4, device=device)
    results = []
    for backend in ("triton", "reference"):
        y = mlp(x, [weight], None, "relu", "gelu", backend=backend)
        sparse = w.relu().to_sparse() if backend == "triton" else w.relu()  # torch's gelu takes no sparse tensor
        outputs = [torch.autograd.grad(y, weight, dy, retain_graph=True)[0] for dy in (negative, sparse)]
        outputs.append(torch.autograd.grad(y, weight, batch, is_grads_batched=True)[0])
        outputs.append(mlp(x, [torch.complex(weight, weight).detach().conj().imag], None, backend="auto"))
        results.append(outputs)
    for ours, torchs in zip(*results):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-4)


def test_compiled_kernels_differ_by_the_tensors_they_save() -> None:
    sigmoid = ACTIVATIONS["sigmoid"]
    networks = [
        network.make_network((4, 4, 4), ((4, 1, 1),) * 2, (activation, IDENTITY), torch.float32, "ieee")
        for activation in (sigmoid, replace(sigmoid, saves="preactivation"))
    ]
    assert networks[0].cache_key != networks[1].cache_key


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")],
    ids=str,
)
@pytest.mark.parametrize("sizes", [(4096, (1024, 512, 784)), (200, (768, 3072, 768)), (16, (512, 256, 64))], ids=str)
def test_chosen_tiles_on_the_sizes_they_are_for(
    sizes: tuple[int, tuple[int, ...]], dtype: torch.dtype, precision: str, device: str, poisoned: None
) -> None:
    case = Case(sizes[0], sizes[1], dtype, "gelu", tf32=precision == "tf32")
    torch.backends.cuda.matmul.fp32_precision = precision
    data = make(case, device)
    check(case, oracle(case, data), gradients(data, forward(case, data, "layer")), by_torch(case, data))


def tiles_per_program(problem: Problem, tile: TileConfig) -> float:
    """The average number of tiles that a program of a layer kernel takes."""
    tiles = cdiv(problem.m, tile.block_m) * cdiv(problem.n, tile.block_n) * tile.split
    return tiles / tile.started(tiles)


ROUNDED = pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "tf32")], ids=str
)


@ROUNDED
def test_persistent_programs_take_several_tiles(
    dtype: torch.dtype, precision: str, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This runs in the interpreter. The next test does the same on a GPU."""
    case = Case(130, (64, 96, 64), dtype, "gelu", tf32=precision == "tf32")
    torch.backends.cuda.matmul.fp32_precision = precision
    several: list[bool] = []

    def tile_for(problem: Problem, device: Device) -> TileConfig:
        tile = pick_tile("persistent", problem)
        several.append(tile.descriptors and tiles_per_program(problem, tile) > 1)
        return tile

    layer_path.layer_path.cache_clear()  # it caches paths with other tiles
    monkeypatch.setattr(tables, "choice_for", lambda *arguments: tables.Choice(tile_for(*arguments), "a test"))
    data = make(case)
    ours = gradients(data, forward(case, data, "layer"))
    layer_path.layer_path.cache_clear()
    assert several == [True] * 6  # forward, dgrad and wgrad of each layer
    check(case, oracle(case, data), ours, by_torch(case, data))


@pytest.mark.gpu
@ROUNDED
def test_programs_of_chosen_persistent_tiles_take_several_tiles(
    dtype: torch.dtype, precision: str, device: str, poisoned: None
) -> None:
    """The compiler flattens the loop over tiles, so the first loads of a tile overlap the end of the tile before it."""
    rows, width = 16384, 1024
    for kind in ("forward", "dgrad"):
        problem = Problem(kind, rows, width, width, dtype, precision)
        tile = choose(problem, describe(device))
        if not tile.programs:
            pytest.skip(f"the tile chosen for this GPU has a program for each tile of the output: {tile}")
        assert tiles_per_program(problem, tile) > 1
    case = Case(rows, (width,) * 3, dtype, "gelu", tf32=precision == "tf32")
    torch.backends.cuda.matmul.fp32_precision = precision
    data = make(case, device)
    x, layers, _ = find(case, data)
    with count_launches() as launches:
        y = run_layers(x, data.weights, data.biases, find_layers(x, layers, dtype, "triton"))
        ours = gradients(data, y)
    assert launches["layer_forward_kernel"] == launches["dgrad_kernel"] == 2
    check(case, oracle(case, data), ours, by_torch(case, data))


def test_a_lazily_negated_input(device: str, path: str) -> None:
    data = make(Case(needs="parameters"), device)
    negative = torch.complex(data.x, data.x).conj().imag
    assert negative.is_neg()
    layers = [Layer(data.weights[0], data.biases[0], IDENTITY)]
    y = run_kernels(negative, layers, torch.float32, None, "triton")
    torch.testing.assert_close(y, run_kernels(-data.x, layers, torch.float32, None, "triton"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weight_gradient_over_a_million_rows(dtype: torch.dtype, device: str) -> None:
    rows, width = 2**20, 64
    dz, h = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
    dw, db = torch.empty((width, width), dtype=dtype, device=device), torch.empty((width,), dtype=dtype, device=device)
    wgrad(dz, h, dw, db, "ieee")
    for ours, torchs, true in (
        (dw, dz.t() @ h, dz.double().t() @ h.double()),
        (db, dz.sum(0), dz.double().sum(0)),
    ):
        slack = torch.finfo(dtype).eps / 2 * true.abs().max()
        assert (ours - true).abs().max() <= (torchs - true).abs().max() + slack


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("recompute", [True, False], ids="recompute={}".format)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_a_network_over_a_million_rows(dtype: torch.dtype, recompute: bool, device: str) -> None:
    case = Case(2**20, (32, 32, 32), dtype, needs="parameters")
    few = make(replace(case, rows=2**14), device)
    dy = torch.randn(case.rows, 32, device=device).to(dtype)
    data = Data(few.x.repeat(64, 1), few.weights, few.biases, dy)
    twin = data.to(dtype)
    ours = gradients(data, forward(case, data, "network", recompute))
    torchs = gradients(twin, reference.mlp(twin.x, twin.weights, twin.biases, case.activations))
    truth = oracle(case, data)
    for name, true in truth.values.items():
        slack = torch.finfo(dtype).eps / 2 * true.abs().max()
        assert (ours[name] - true).abs().max() <= (torchs[name] - true).abs().max() + slack, name


@pytest.mark.gpu
@pytest.mark.alone
def test_a_network_of_more_than_2_to_31_elements(device: str) -> None:
    rows, width = 2**25 + 3, 64
    x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    weights = [torch.randn(width, width, device=device, dtype=torch.bfloat16) / 8 for _ in range(2)]
    y = mlp(x, weights, None, backend="triton")
    some = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device=device)
    torch.testing.assert_close(y[some], mlp(x[some], weights, None, backend="reference"))


@pytest.mark.gpu
@pytest.mark.alone
def test_more_than_2_to_31_elements(device: str) -> None:
    rows, width = 2**21 + 3, 1025
    x = torch.randn(rows, 64, device=device, dtype=torch.bfloat16)
    weight = torch.randn(width, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    y = mlp(x, [weight], None, backend="triton")
    assert y.numel() > 2**31
    some = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device=device)
    torch.testing.assert_close(y[some], x[some] @ weight.t())
    y.backward(torch.ones((), device=device, dtype=torch.bfloat16).expand_as(y))
    expected = x.sum(0, dtype=torch.float64).expand(width, -1)
    assert (weight.grad.double() - expected).norm() <= 2**-8 * expected.norm()
