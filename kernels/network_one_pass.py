"""The backward of a narrow network in one pass over its rows: every dW, every db and dx from one launch.

    h_l = a_l(z_l)                       stored by the forward, rebuilt from the stored z, or recomputed from x
    dW_l += dz_lᵀ h_{l-1}                in registers, over all rows of a program
    db_l += Σ_rows dz_l
    dz_{l-1} = (dz_l W_l) ⊙ a_{l-1}'(saved_{l-1})

Each program writes its sums to its own row of `partial`, and `sum_partials` adds them in a fixed order.

If the sums of all layers do not fit in registers, the layers are divided into groups. A launch takes one group, the
layers LOW <= l < HIGH, and the highest group comes first. A launch reads the dz that the launch before it wrote, and
writes dz for the next.
"""

from __future__ import annotations

from torch import Tensor

from .dropout import factors
from .language import tl, triton
from .launch import Launch, by_columns, cdiv, describable, launch
from .network import (
    Gradients,
    Network,
    activation_backward,
    clear_padding,
    differentiate_layer,
    drop,
    dropout_arguments,
    layer,
    linear,
    load_rows,
    load_weight,
    matmul,
    multiply_back,
    network_offset_type,
    partial_dtype,
    store_rows,
)
from .network_backward import store_sums
from .partial_sums import Partial
from .tile import activate, in_layout, round_to
from .tile_config import TileConfig

__all__ = ["network_one_pass", "network_one_pass_sums"]

ONES = tl.constexpr(16)  # rows of ones in the product that gives db: the fewest that a tensor core takes


@triton.jit
def row_source(
    ptr, M, NET: tl.constexpr, AT: tl.constexpr, BLOCK_M: tl.constexpr, DESCRIPTORS: tl.constexpr, stride
):  # fmt: skip
    """The source from which `read_rows` loads M rows of NET.widths[AT] elements: a descriptor, or a pointer."""
    if DESCRIPTORS:
        return tl.make_tensor_descriptor(ptr, [M, NET.widths[AT]], [stride, 1], [BLOCK_M, NET.pads[AT]])
    else:
        return ptr


@triton.jit
def read_rows(
    source, tile, rows, mask, stride, stride_k, NET: tl.constexpr, AT: tl.constexpr, BLOCK_M: tl.constexpr,
    OFFSET: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Load a tile of rows from `source`, a result of `row_source`.

    Rows beyond the last are zeros if they come through a descriptor or are masked.
    """
    if DESCRIPTORS:
        return round_to(source.load([tile * BLOCK_M, 0]), NET.compute)
    else:
        return load_rows(source, rows * stride, mask, stride_k, NET, AT, OFFSET)


@triton.jit
def zero_weight_sum(NET: tl.constexpr, GRADIENTS: tl.constexpr, LAYER: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The initial sum, zeros, of a layer's dW or dWᵀ; a single element if dW is not wanted."""
    if not GRADIENTS.weights[LAYER]:
        return tl.full([1, 1], 0.0, NET.accumulator)
    elif TRANSPOSED:
        return tl.full([NET.pads[LAYER], NET.pads[LAYER + 1]], 0.0, NET.accumulator)
    else:
        return tl.full([NET.pads[LAYER + 1], NET.pads[LAYER]], 0.0, NET.accumulator)


@triton.jit
def zero_bias_sum(NET: tl.constexpr, GRADIENTS: tl.constexpr, LAYER: tl.constexpr, BLOCK_N: tl.constexpr):
    """The initial sum, zeros, of a layer's db, whose rows or columns are all equal; one element if db is not wanted."""
    if not GRADIENTS.biases[LAYER]:
        return tl.full([1, 1], 0.0, NET.accumulator)
    elif BLOCK_N > 0:
        return tl.full([NET.pads[LAYER + 1], BLOCK_N], 0.0, NET.accumulator)
    else:
        return tl.full([ONES if NET.sums_by_dot else 1, NET.pads[LAYER + 1]], 0.0, NET.accumulator)


@triton.jit
def add_rows(dz, ones, db, NET: tl.constexpr, BLOCK_N: tl.constexpr):
    """db + Σ_rows dz."""
    if BLOCK_N > 0:
        return matmul(tl.trans(dz), ones, db, NET)
    elif NET.sums_by_dot:
        return matmul(ones, dz, db, NET)
    else:
        return db + tl.sum(dz.to(NET.accumulator), axis=0)[None, :]


@triton.jit
def rebuild(z, dh, seed_ptr, keeps, m, NET: tl.constexpr, LAYER: tl.constexpr):
    """(h, dz) from a stored z: h = a(z) and dz = dh ⊙ a'(z). They share an exponential, and Dropout's mask."""
    FORWARD: tl.constexpr = NET.forwards[LAYER]
    BOTH: tl.constexpr = NET.forwards_and_slopes[LAYER]
    PARAMETERS: tl.constexpr = NET.parameters[LAYER]
    z = z.to(NET.accumulator)
    if NET.drops[LAYER]:
        left = factors(seed_ptr, keeps[LAYER], LAYER, m, 0, dh.shape[0], dh.shape[1])
        dh = dh * left
    # Different products read h and dz. If these had different layouts, their common parts would be computed twice.
    if BOTH is not None:
        h, slope = BOTH(z)
        h = in_layout(h, dh)
        dz = dh * slope
    else:
        z = in_layout(z, dh)
        h = activate(z, FORWARD, PARAMETERS)
        dz = differentiate_layer(dh, z, NET, LAYER)
    if NET.drops[LAYER]:
        h = h * left
    h = round_to(clear_padding(h, NET, LAYER + 1), NET.compute)
    return h, round_to(clear_padding(dz, NET, LAYER + 1), NET.compute)


@triton.jit
def rebuild_output(z, seed_ptr, keeps, m, NET: tl.constexpr, LAYER: tl.constexpr):
    """h = a(z) from a stored z, after Dropout."""
    FORWARD: tl.constexpr = NET.forwards[LAYER]
    PARAMETERS: tl.constexpr = NET.parameters[LAYER]
    h = drop(activate(z.to(NET.accumulator), FORWARD, PARAMETERS), seed_ptr, keeps, m, NET, LAYER)
    return round_to(clear_padding(h, NET, LAYER + 1), NET.compute)


@triton.jit(do_not_specialize=["M"])
def network_one_pass_kernel(
    x_ptr,  # (M, d_0)
    dy_ptr,  # (M, d_L)
    dx_ptr,  # (M, d_0), contiguous; or None
    w_ptrs,
    b_ptrs,
    kept_ptr,  # the saved tensors, as the forward wrote them; None: the hidden layers are recomputed from x
    last_saved_ptr,  # (M, d_L), contiguous: the saved tensor of the last layer; None: no activation, or recomputed
    dz_ptr,  # dz between two groups of layers, laid out as kept_ptr; None where one launch takes all layers
    h_ptr,  # every recomputed h, laid out as kept_ptr, for tests; or None
    partial_ptr,  # (programs, size), contiguous: every wanted dW and db, at the offsets in GRADIENTS
    seed_ptr,  # (1,), Dropout's seed; without Dropout this and the next are None
    keeps,  # for each layer, the probability that an element is kept; None where the layer has no Dropout
    M,
    size,
    stride_xm,
    stride_xk,
    stride_dm,
    stride_dn,
    NET: tl.constexpr,
    GRADIENTS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    OFFSET: tl.constexpr,
    MERGES: tl.constexpr,  # True if relu may be part of the rounding of a recomputed h
    TRANSPOSED: tl.constexpr,  # True if dWᵀ = hᵀ dz is summed, False if dW = dzᵀ h is
    DESCRIPTORS: tl.constexpr,  # True if x, dy and the stored tensors are read through tensor descriptors
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr = 0,  # columns of ones in the product that gives db; 0: it has rows of ones
):
    LAST: tl.constexpr = len(w_ptrs) - 1
    LOWEST: tl.constexpr = GRADIENTS.lowest
    RECOMPUTE: tl.constexpr = kept_ptr is None
    BASE: tl.constexpr = 0 if RECOMPUTE else LOW  # the first layer whose input stays on the chip
    # The first layer whose weight stays on the chip.
    FIRST: tl.constexpr = BASE if RECOMPUTE or LOW > LOWEST or dx_ptr is not None else LOW + 1
    ws = ()
    for i in tl.static_range(FIRST, HIGH):
        ws = ws + (load_weight(w_ptrs[i], NET, i, OFFSET),)
    dws, dbs = (), ()
    for i in tl.static_range(LOW, HIGH):
        dws = dws + (zero_weight_sum(NET, GRADIENTS, i, TRANSPOSED),)
        dbs = dbs + (zero_bias_sum(NET, GRADIENTS, i, BLOCK_N),)
    ones = round_to(tl.full([BLOCK_M, BLOCK_N] if BLOCK_N > 0 else [ONES, BLOCK_M], 1.0, NET.accumulator), NET.compute)
    if HIGH > LAST:
        dz_rows = row_source(dy_ptr, M, NET, HIGH, BLOCK_M, DESCRIPTORS, stride_dm)
    else:
        dz_rows = dz_ptr + M.to(OFFSET) * NET.starts[HIGH - 1]
        stride_dm = NET.widths[HIGH]
        stride_dn = 1
    sources = ()  # for each layer, the source of its stored input
    for i in tl.static_range(BASE, BASE + 1 if RECOMPUTE else HIGH):
        if i == 0:
            sources = sources + (row_source(x_ptr, M, NET, 0, BLOCK_M, DESCRIPTORS, stride_xm),)
        else:
            layer_ptr = kept_ptr + M.to(OFFSET) * NET.starts[i - 1]
            sources = sources + (row_source(layer_ptr, M, NET, i, BLOCK_M, DESCRIPTORS, NET.widths[i]),)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]).to(OFFSET)
        inside = rows < M
        safe = tl.minimum(rows, M - 1)
        # Rows beyond the last have no gradient and add nothing to any sum.
        BY_DESCRIPTOR: tl.constexpr = DESCRIPTORS and HIGH > LAST
        dz = read_rows(dz_rows, tile, safe, inside, stride_dm, stride_dn, NET, HIGH, BLOCK_M, OFFSET, BY_DESCRIPTOR)
        saved, hs = (), ()
        for i in tl.static_range(BASE, HIGH):
            if i == 0:
                h = read_rows(sources[0], tile, safe, None, stride_xm, stride_xk, NET, 0, BLOCK_M, OFFSET, DESCRIPTORS)
                kept = h
            elif RECOMPUTE:
                z = linear(hs[i - 1], ws[i - 1], b_ptrs[i - 1], NET, i - 1, BLOCK_M, OFFSET)
                kept, h = layer(z, seed_ptr, keeps, tile * BLOCK_M, NET, i - 1, MERGES and NET.merges[i - 1])
                if h_ptr is not None:
                    start = M.to(OFFSET) * NET.starts[i - 1] + rows * NET.widths[i]
                    store_rows(h_ptr, start, inside, h, NET, i)
            else:
                h = read_rows(
                    sources[i - BASE], tile, safe, None, NET.widths[i], 1, NET, i, BLOCK_M, OFFSET, DESCRIPTORS
                )
                kept = h
            saved = saved + (kept,)
            hs = hs + (h,)
        if HIGH > LAST and NET.differentiates_output:
            last_saved = dz  # a placeholder: without an activation, no tensor is saved, and none is read
            if last_saved_ptr is not None:
                last_saved = load_rows(last_saved_ptr, safe * NET.widths[LAST + 1], None, 1, NET, LAST + 1, OFFSET)
            elif NET.activates_output:
                z = linear(hs[LAST], ws[LAST], b_ptrs[LAST], NET, LAST, BLOCK_M, OFFSET)
                last_saved, h = layer(z, seed_ptr, keeps, tile * BLOCK_M, NET, LAST)
            dz = activation_backward(dz, last_saved, seed_ptr, keeps, tile * BLOCK_M, NET, LAST)
        sums_w, sums_b = (), ()
        for i in tl.static_range(HIGH - 1, LOW - 1, -1):
            h = hs[i - BASE]
            # The product for the layer below comes first, so that the products for dW and db run while it is used.
            if i > LOW:
                dh = multiply_back(dz, ws[i - FIRST], NET, i, BLOCK_M)
            if not RECOMPUTE and NET.rebuilds[i] is not None:
                if i > LOW:
                    h, below = rebuild(h, dh, seed_ptr, keeps, tile * BLOCK_M, NET, i - 1)
                else:
                    h = rebuild_output(h, seed_ptr, keeps, tile * BLOCK_M, NET, i - 1)
            dw = dws[i - LOW]
            db = dbs[i - LOW]
            if GRADIENTS.weights[i] and TRANSPOSED:
                dw = matmul(tl.trans(h), dz, dw, NET)
            elif GRADIENTS.weights[i]:
                dw = matmul(tl.trans(dz), h, dw, NET)
            if GRADIENTS.biases[i]:
                db = add_rows(dz, ones, db, NET, BLOCK_N)
            sums_w = (dw,) + sums_w
            sums_b = (db,) + sums_b
            if i > LOW and (RECOMPUTE or NET.rebuilds[i] is None):
                dz = activation_backward(dh, saved[i - BASE], seed_ptr, keeps, tile * BLOCK_M, NET, i - 1)
            elif i > LOW:
                dz = below
            elif i > LOWEST:
                dh = multiply_back(dz, ws[i - FIRST], NET, i, BLOCK_M)
                dz = activation_backward(dh, saved[i - BASE], seed_ptr, keeps, tile * BLOCK_M, NET, i - 1)
        if LOW > LOWEST:
            start = M.to(OFFSET) * NET.starts[LOW - 1] + rows * NET.widths[LOW]
            store_rows(dz_ptr, start, inside, dz, NET, LOW)
        elif dx_ptr is not None:
            store_rows(dx_ptr, rows * NET.widths[0], inside, multiply_back(dz, ws[0], NET, 0, BLOCK_M), NET, 0)
        dws = sums_w
        dbs = sums_b
    partial_ptr += tl.program_id(0).to(OFFSET) * size
    for i in tl.static_range(LOW, HIGH):
        dw = tl.trans(dws[i - LOW]) if TRANSPOSED else dws[i - LOW]
        db = dbs[i - LOW] if BLOCK_N > 0 else tl.trans(dbs[i - LOW])
        store_sums(partial_ptr, dw, db, 0, 0, NET, GRADIENTS, i)


def network_one_pass_sums(rows: int, network: Network, gradients: Gradients, tile: TileConfig) -> Partial:
    """The partial sums of `network_one_pass`: one for each program."""
    return Partial(tile.started(cdiv(rows, tile.block_m)), gradients.starts[-1], 0, partial_dtype(network))


def network_one_pass(
    x: Tensor,
    dy: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    kept: Tensor | None,
    last_saved: Tensor | None,
    dz: Tensor | None,
    dx: Tensor | None,
    partial: Tensor,
    network: Network,
    gradients: Gradients,
    tile: TileConfig,
    group: tuple[int, int] | None = None,
    *,
    h: Tensor | None = None,
    seed: Tensor | None = None,
    keeps: tuple[float | None, ...] | None = None,
) -> Launch | None:
    """Launch dx, and the partial sums of every dW and db in `gradients`.

    Args:
        x, dy: (M, d_0) and (M, d_L), any strides.
        weights, biases, h, seed, keeps: as in `network_forward`.
        kept: the saved tensors, as `network_forward` wrote them; None: the hidden layers are recomputed.
        last_saved: (M, d_L), contiguous: the saved tensor of the last layer. None if it has no activation, or if `kept`
            is None.
        dz: dz of the hidden layers, laid out as kept. Read and written if a launch takes only a group of layers.
        dx: (M, d_0), contiguous, written; or None.
        partial: written, in the shape of `network_one_pass_sums`; the input of `sum_partials`.
        group: the layers low <= i < high of this launch; None: all. The highest group is launched first.
    """
    rows = x.shape[0]
    low, high = group or (gradients.lowest, network.layers)
    tensors, dropout_scalars = dropout_arguments(
        (x, dy, dx if low == 0 else None, weights, biases, kept, last_saved, dz, h, partial), seed, keeps
    )
    return launch(
        network_one_pass_kernel,
        partial.shape[0],
        x.device,
        tile,
        tensors,
        (*dropout_scalars, rows, partial.shape[1], *x.stride(), *dy.stride()),
        NET=network,
        GRADIENTS=gradients,
        LOW=max(low, gradients.lowest),
        HIGH=high,
        OFFSET=network_offset_type(network, rows, x, dy),
        MERGES=_merges(network),
        TRANSPOSED=kept is not None or _transposes(network),
        DESCRIPTORS=tile.descriptors and _describable(x, dy, kept, network),
    )


def _merges(network: Network) -> bool:
    """True if relu is part of the rounding of a recomputed h, where it can be.

    Not if x or y is narrower than 64 beside layers that are 64 wide: the compiler would serialise all products. Where
    it does not, a tile of rows takes fewer instructions: 213 instead of 232 with 4 layers 16 wide, 429 instead of 509
    with 32, and 962 instead of 1095 with 64 (sm_90, Triton 3.7.1).
    """
    return max(network.pads) < 64 or min(network.pads[0], network.pads[-1]) == 64


def _transposes(network: Network) -> bool:
    """True if the pass that recomputes h sums dWᵀ, because the compiler would serialise the products of dW.

    The compiler serialises them if x is narrower than a wgmma instruction and dx is not wanted. For such an x, dWᵀ is
    summed with dx too. On an H100, 16 -> 64 -> 64 -> 16 by dWᵀ took 0.345 ms (fp16, 2^21 rows, Triton 3.6), in a sketch
    with the same number of waits. Other networks sum dW: 64 -> 64 -> 64 -> 64 -> 64 spilled 78 words by dW, and 100 by
    dWᵀ.
    """
    return network.pads[0] < 64 == max(network.pads)


def _describable(x: Tensor, dy: Tensor, kept: Tensor | None, network: Network) -> bool:
    """True if tensor descriptors can load all rows: rows are 16-byte aligned, and zeros after the last do no harm."""
    # A descriptor loads zeros for a row after the last. Such a row has dh = 0. So its dz = dh a'(0) is 0 if a'(0) is
    # finite, as it is for every piecewise polynomial, and adds nothing to a sum.
    hidden = zip(network.activations[:-1], network.saves_z)
    harmless = all(activation.piecewise and not saves_z for activation, saves_z in hidden)
    stored = kept is None or all(width * kept.itemsize % 16 == 0 for width in network.widths[1:-1])
    return harmless and stored and describable(x, dy) and by_columns(x) and by_columns(dy)
