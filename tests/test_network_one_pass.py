"""The one-pass backward of a network in all its forms, over the table of cases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import CASES, HALVES, SEED, Case, Data, check, gradients, make, oracle
from kernel_runs import by_torch, case_id, find
from kernel_runs import forward as forward_by_rule
from torch import Tensor

from mlp_fused.engine.autograd import run_network
from mlp_fused.engine.network_path import NetworkPath
from mlp_fused.kernels.activations import ACTIVATIONS
from mlp_fused.kernels.language import tl, triton
from mlp_fused.kernels.launch import count_launches
from mlp_fused.kernels.tile_config import TileConfig

# Small tiles and three programs, so that in most cases a program runs several tiles.
FORMS = {
    "stored": TileConfig(32, programs=3, descriptors=True),
    "stored by layers": TileConfig(16, 16, programs=3),
    "recompute": TileConfig(32, programs=3),
}


def make_path(form: str, case: Case, data: Data) -> NetworkPath:
    """The network path of a case, with its backward in the given form."""
    path = find(case, data)[2]
    assert isinstance(path, NetworkPath)
    layers = len(case.widths) - 1
    groups = {"stored": ((0, layers),), "stored by layers": tuple((i, i + 1) for i in reversed(range(layers)))}
    return NetworkPath(
        path.network,
        path.forward_tile,
        "recompute" if form == "recompute" else "stored",
        "a test",
        FORMS[form],
        path.wgrad_tile,
        groups.get(form, ()),
        path.dropouts,
    )


def forward(form: str, case: Case, data: Data) -> Tensor:
    """y of a network whose backward has the given form."""
    x = data.x.reshape(-1, data.x.shape[-1])
    torch.manual_seed(SEED)  # for Dropout
    y = run_network(x, tuple(data.weights), tuple(data.biases), make_path(form, case, data))
    return y.view(*data.x.shape[:-1], y.shape[-1])


def is_one_pass(case: Case) -> bool:
    """True if a case is a network in 16 bits, whose sums fit in registers."""
    return case.dtype in HALVES and max(case.widths) <= 128


def parameters() -> list[object]:
    """Every case in one of the forms, in rotation. The other forms run with `-m full`."""
    listed = []
    forms = list(FORMS)
    for turn, case in enumerate(case for case in CASES if is_one_pass(case)):
        for form in forms:
            only_full = form != forms[turn % 3]
            listed.append(pytest.param(form, case, marks=pytest.mark.full if only_full else ()))
    return listed


@pytest.mark.parametrize(("form", "case"), parameters(), ids=case_id)
def test_gradients_in_one_pass(form: str, case: Case, device: str, poisoned: None) -> None:
    data = make(case, device)
    with count_launches() as launches:
        ours = gradients(data, forward(form, case, data))
    assert not {"network_dgrad_kernel", "network_wgrad_kernel"} & launches.keys()
    check(case, oracle(case, data), ours, by_torch(case, data))


WIDE = Case(130, (24, 48, 40, 16), torch.bfloat16, needs="everything")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "mish", "tanh"])
@pytest.mark.parametrize("needs", ["everything", "input", "first layer", "last layer", "weights", "biases"])
def test_needed_gradients_in_one_pass(needs: str, activation: str, form: str, device: str, poisoned: None) -> None:
    """The output has an activation. Only the needed gradients are computed."""
    case = replace(WIDE, needs=needs, activation=activation, output_activation=activation)
    check_needed_gradients(case, form, device)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("activation", "output"), [("relu", "identity"), ("gelu", "tanh"), ("tanh", "relu")])
@pytest.mark.parametrize("needs", ["everything", "first layer", "last layer", "biases"])
def test_needed_gradients_after_dropout(
    needs: str, activation: str, output: str, form: str, device: str, poisoned: None
) -> None:
    case = replace(WIDE, needs=needs, activation=activation, output_activation=output, dropout=0.3)
    check_needed_gradients(case, form, device)


def check_needed_gradients(case: Case, form: str, device: str) -> None:
    data = make(case, device)
    with count_launches() as launches:
        ours = gradients(data, forward(form, case, data))
    by_layers = {"last layer": 1}.get(case.needs, 3)
    assert launches["network_one_pass_kernel"] == (by_layers if form == "stored by layers" else 1)
    check(case, oracle(case, data), ours, by_torch(case, data))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids="dropout={}".format)
def test_one_pass_gives_the_same_bits_every_time(
    dropout: float, activation: str, form: str, device: str, poisoned: None
) -> None:
    rows = 1100 if device == "cuda" else 200  # in the interpreter, two tiles for each program are enough
    case = replace(WIDE, rows=rows, activation=activation, dtype=torch.float16, dropout=dropout)
    runs = [gradients(data, forward(form, case, data)) for data in (make(case, device), make(case, device))]
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name]), name


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded", "expanded gradient"])
def test_rows_that_descriptors_cannot_describe_in_one_pass(layout: str, device: str, poisoned: None) -> None:
    """x and dy may have any strides, and their rows need not be a multiple of 16 bytes."""
    for widths in ((24, 48, 40, 16), (20, 31, 24, 17)):
        case = replace(WIDE, widths=widths, layout=layout)
        data = make(case, device)
        check(case, oracle(case, data), gradients(data, forward("stored", case, data)), by_torch(case, data))


@pytest.mark.parametrize("recompute", [None, True, False], ids="recompute={}".format)
@pytest.mark.parametrize(("widths", "launches"), [((64, 64, 64, 64), 1), ((40, 128, 128, 10), 3)], ids=str)
def test_the_tiles_of_the_rule_in_one_pass(
    widths: tuple[int, ...], launches: int, recompute: bool | None, device: str, poisoned: None
) -> None:
    """A width of 64 takes one launch, and a width of 128 one per layer. A forward comes first if only x was saved."""
    case = Case(300, widths, torch.bfloat16, "gelu")
    data = make(case, device)
    y = forward_by_rule(case, data, "network", recompute)
    with count_launches() as counted:
        ours = gradients(data, y)
    recomputed = {"network_forward_kernel": 1} if recompute else {}
    assert counted == {**recomputed, "network_one_pass_kernel": launches, "sum_partials_kernel": 1}
    check(case, oracle(case, data), ours, by_torch(case, data))


@pytest.mark.parametrize(
    "name", [name for name, activation in ACTIVATIONS.items() if activation.forward_and_slope is not None]
)
def test_h_and_slope_computed_together_are_accurate(name: str, device: str) -> None:
    """Compute them in fp32 for every finite bfloat16 z, and compare them with the twin in float64."""
    z = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    z = z[z.isfinite()].float().to(device)
    h, slope = torch.empty_like(z), torch.empty_like(z)
    function = ACTIVATIONS[name].forward_and_slope
    both_kernel[(1,)](z, h, slope, z.numel(), function, 2**16)
    wide = z.double().requires_grad_()
    true = ACTIVATIONS[name](wide)
    (true_slope,) = torch.autograd.grad(true.sum(), wide)
    assert ((h - true.detach()).abs() <= 3e-7 * (1 + z.abs())).all()
    assert ((slope - true_slope).abs() <= 3e-7).all()


@triton.jit
def both_kernel(z_ptr, h_ptr, slope_ptr, count, BOTH: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    h, slope = BOTH(tl.load(z_ptr + offsets, mask=offsets < count, other=0.0))
    tl.store(h_ptr + offsets, h, mask=offsets < count)
    tl.store(slope_ptr + offsets, slope, mask=offsets < count)
