"""ACTIVATIONS: the table of all activations. `activation.py` describes an entry.

Names, error texts, the mapping from `nn.Module` classes and test ids all come from the table.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .activation import ACTIVATIONS, Saved, _restore, register_activation
from .language import tl, triton

__all__ = ["ACTIVATIONS", "BUILT_IN", "IDENTITY", "_restore"]  # pickles name `_restore` here


# Elementary functions: sigmoid, and three that Triton's language lacks. All have a small relative error near 0. The
# result is right even where an intermediate number overflows.


@triton.jit
def expm1(x):
    """e^x - 1: its Taylor polynomial for |x| < 0.35 (relative truncation error below 1e-12), else exp(x) - 1."""
    p = x * (1 / 11) + 1
    p = p * x * (1 / 10) + 1
    p = p * x * (1 / 9) + 1
    p = p * x * (1 / 8) + 1
    p = p * x * (1 / 7) + 1
    p = p * x * (1 / 6) + 1
    p = p * x * (1 / 5) + 1
    p = p * x * (1 / 4) + 1
    p = p * x * (1 / 3) + 1
    p = p * x * (1 / 2) + 1
    return tl.where(tl.abs(x) < 0.35, p * x, tl.exp(x) - 1)


@triton.jit
def log1p_unit(x):
    """log(1 + x) for 0 <= x <= 1, as the power series of 2 artanh(x / (2 + x)), to a relative error of 1e-11."""
    s = x / (2 + x)
    t = s * s
    p = t * (1 / 21) + 1 / 19
    p = p * t + 1 / 17
    p = p * t + 1 / 15
    p = p * t + 1 / 13
    p = p * t + 1 / 11
    p = p * t + 1 / 9
    p = p * t + 1 / 7
    p = p * t + 1 / 5
    p = p * t + 1 / 3
    return 2 * s * (p * t + 1)


@triton.jit
def tanh(x):
    """The hyperbolic tangent, from expm1(-2|x|), which lies in [-1, 0]."""
    t = expm1(-2 * tl.abs(x))
    magnitude = -t / (t + 2)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1 / (1 + tl.exp(-x))


# The table. Forward, derivative and their torch twins stand together, so that a change to one is made with the others
# in view.


@triton.jit
def identity_forward(z):
    return z


@triton.jit
def identity_backward(dh, h):
    return dh


register_activation(
    "identity",
    identity_forward,
    identity_backward,
    saves="output",
    reference=lambda z: z,
    reference_backward=lambda dh, h: dh,
    module=nn.Identity,
    scales=True,
    piecewise=True,
)


@triton.jit
def relu_forward(z):
    return tl.where(z < 0, 0.0, z)  # a comparison, not a maximum: NaN stays NaN


@triton.jit
def relu_backward(dh, h):
    return tl.where(h <= 0, 0.0, dh)  # at NaN the gradient passes, as in torch


register_activation(
    "relu",
    relu_forward,
    relu_backward,
    saves="output",
    reference=lambda z: F.relu(z),
    reference_backward=lambda dh, h: dh.masked_fill(h <= 0, 0),
    module=nn.ReLU,
    kinks=lambda: (0.0,),
    scales=True,
    piecewise=True,
)


@triton.jit
def leaky_relu_forward(z, negative_slope):
    return tl.where(z > 0, z, z * negative_slope)


@triton.jit
def leaky_relu_backward(dh, saved, negative_slope):
    return tl.where(saved > 0, dh, dh * negative_slope)


register_activation(
    "leaky_relu",
    leaky_relu_forward,
    leaky_relu_backward,
    saves=lambda negative_slope: "output" if negative_slope >= 0 else "preactivation",  # else h has lost z's sign
    reference=lambda z, negative_slope: F.leaky_relu(z, negative_slope),
    reference_backward=lambda dh, h, negative_slope: torch.where(h > 0, dh, dh * negative_slope),
    parameters={"negative_slope": 0.01},
    module=nn.LeakyReLU,
    kinks=lambda negative_slope: (0.0,),
    scales=True,
    piecewise=True,
)


@triton.jit
def hardtanh_forward(z, min_val, max_val):
    return tl.where(z < min_val, min_val, tl.where(z > max_val, max_val, z))


@triton.jit
def hardtanh_backward(dh, h, min_val, max_val):
    return tl.where((h <= min_val) | (h >= max_val), 0.0, dh)


def _hardtanh_reference_backward(dh: Tensor, h: Tensor, min_val: float, max_val: float) -> Tensor:
    return dh.masked_fill((h <= min_val) | (h >= max_val), 0)


def _has_ordered_limits(module: Any) -> bool:
    """True if torch accepts an nn.Hardtanh with its present limits."""
    return bool(module.min_val <= module.max_val)


register_activation(
    "hardtanh",
    hardtanh_forward,
    hardtanh_backward,
    saves="output",
    reference=lambda z, min_val, max_val: F.hardtanh(z, min_val, max_val),
    reference_backward=_hardtanh_reference_backward,
    parameters={"min_val": -1.0, "max_val": 1.0},
    module=nn.Hardtanh,
    matches=_has_ordered_limits,
    kinks=lambda min_val, max_val: (min_val, max_val),
    rounds_parameters=True,  # a clamped output equals the bound after rounding
    piecewise=True,
)


@triton.jit
def relu6_forward(z):
    return hardtanh_forward(z, 0.0, 6.0)


@triton.jit
def relu6_backward(dh, h):
    return hardtanh_backward(dh, h, 0.0, 6.0)


register_activation(
    "relu6",
    relu6_forward,
    relu6_backward,
    saves="output",
    reference=lambda z: F.relu6(z),
    reference_backward=lambda dh, h: _hardtanh_reference_backward(dh, h, 0.0, 6.0),
    module=nn.ReLU6,
    kinks=lambda: (0.0, 6.0),
    piecewise=True,
)


@triton.jit
def squared_relu_forward(z):
    h = relu_forward(z)
    return h * h


@triton.jit
def squared_relu_backward(dh, z):
    return dh * 2 * relu_forward(z)


register_activation(
    "squared_relu",
    squared_relu_forward,
    squared_relu_backward,
    reference=lambda z: F.relu(z).square(),
    piecewise=True,
)


@triton.jit
def threshold_forward(z, threshold, value):
    return tl.where(z <= threshold, value, z)


@triton.jit
def threshold_backward(dh, z, threshold, value):
    return tl.where(z <= threshold, 0.0, dh)


register_activation(
    "threshold",
    threshold_forward,
    threshold_backward,
    reference=lambda z, threshold, value: F.threshold(z, threshold, value),
    parameters={"threshold": 0.0, "value": 0.0},
    module=nn.Threshold,
    kinks=lambda threshold, value: (threshold,),
    piecewise=True,
)


@triton.jit
def elu_forward(z, alpha):
    return tl.where(z > 0, z, alpha * expm1(z))


@triton.jit
def elu_backward(dh, z, alpha):
    return tl.where(z <= 0, dh * alpha * tl.exp(z), dh)


register_activation(
    "elu",
    elu_forward,
    elu_backward,
    reference=lambda z, alpha: F.elu(z, alpha),
    parameters={"alpha": 1.0},
    module=nn.ELU,
    kinks=lambda alpha: (0.0,),
)


@triton.jit
def celu_forward(z, alpha):
    return tl.where(z > 0, z, alpha * expm1(z / alpha))


@triton.jit
def celu_backward(dh, z, alpha):
    return tl.where(z <= 0, dh * tl.exp(z / alpha), dh)


register_activation(
    "celu",
    celu_forward,
    celu_backward,
    reference=lambda z, alpha: F.celu(z, alpha),
    parameters={"alpha": 1.0},
    module=nn.CELU,
    matches=lambda module: bool(module.alpha != 0),  # torch refuses 0
    kinks=lambda alpha: (0.0,),
)


@triton.jit
def selu_forward(z):
    # scale and alpha: Klambauer et al., "Self-Normalizing Neural Networks", arXiv 1706.02515, equation 14
    return 1.0507009873554805 * tl.where(z > 0, z, 1.6732632423543772 * expm1(z))


@triton.jit
def selu_backward(dh, z):
    return dh * 1.0507009873554805 * tl.where(z <= 0, 1.6732632423543772 * tl.exp(z), 1.0)


register_activation(
    "selu", selu_forward, selu_backward, reference=lambda z: F.selu(z), module=nn.SELU, kinks=lambda: (0.0,)
)


@triton.jit
def gelu_forward(z):
    """z Φ(z), with the tail Φ(-|z|) computed as 2^p(|z|).

    The polynomial p approximates log2 Φ(-t). It is fitted on 0 <= t <= 6 to minimise the largest error of Φ, which is
    4e-8, as small as fp32's own rounding. Beyond 6, its leading coefficient takes it to -inf. A polynomial and one
    exponential, with no branch, take a third of erf's instructions, and the tail has no cancellation.
    """
    t = tl.abs(z)
    p = t * -2.6499466e-08 + 8.0473228e-07
    p = p * t - 1.0441249e-05
    p = p * t + 7.3639421e-05
    p = p * t - 0.00027050293
    p = p * t - 1.8598843e-05
    p = p * t + 0.0069698878
    p = p * t - 0.052457333
    p = p * t - 0.45921531
    p = p * t - 1.1511049
    tail = tl.exp2(p * t - 1)
    return z * tl.where(z < 0, tail, 1 - tail)


@triton.jit
def gelu_backward(dh, z):
    """dh a'(z) with the slope a'(z) = Φ(z) + z φ(z).

    At -t, for t >= 0, the slope is exp(-t²/2) p(t). At t it is 1 minus that. The polynomial p is fitted on 0 <= t <= 6
    to minimise the largest error of this product, which is 2e-8.
    """
    t = tl.abs(z)
    e = tl.exp2(t * t * -0.7213475204444817)  # log2(e) / 2
    t = tl.minimum(t, 8.0)  # beyond 8, e alone makes the tail negligible; p must not overflow
    p = t * -3.1554299e-07 + 7.708778e-06
    p = p * t - 8.4770982e-05
    p = p * t + 0.00056365272
    p = p * t - 0.0025900903
    p = p * t + 0.0090038478
    p = p * t - 0.025471818
    p = p * t + 0.061923932
    p = p * t - 0.13280578
    p = p * t + 0.24997257
    p = p * t - 0.79788285
    p = p * t + 0.49999997
    tail = e * p
    return dh * tl.where(z < 0, tail, 1 - tail)


@triton.jit
def gelu_forward_and_slope(z):
    """z Φ(z) and a'(z) from one exponential and one polynomial: Φ(-t) = a'(-t) + t φ(t) at t = |z|."""
    # This repeats gelu_backward's polynomial. A shared function would change the digest of gelu's dgrad, and so drop
    # its measured rows. Computing h from gelu_backward's result would take an eighth more instructions.
    t = tl.abs(z)
    e = tl.exp2(t * t * -0.7213475204444817)
    t = tl.minimum(t, 8.0)
    p = t * -3.1554299e-07 + 7.708778e-06
    p = p * t - 8.4770982e-05
    p = p * t + 0.00056365272
    p = p * t - 0.0025900903
    p = p * t + 0.0090038478
    p = p * t - 0.025471818
    p = p * t + 0.061923932
    p = p * t - 0.13280578
    p = p * t + 0.24997257
    p = p * t - 0.79788285
    p = p * t + 0.49999997
    slope = e * p
    tail = e * (p + t * 0.3989422804014327)
    return z * tl.where(z < 0, tail, 1 - tail), tl.where(z < 0, slope, 1 - slope)


register_activation(
    "gelu",
    gelu_forward,
    gelu_backward,
    forward_and_slope=gelu_forward_and_slope,
    reference=lambda z: F.gelu(z),
    module=nn.GELU,
    matches=lambda module: module.approximate == "none",
)


@triton.jit
def gelu_tanh_gate(z):
    # (1 + tanh u) / 2 = sigmoid(2u), with u = sqrt(2 / pi) (z + 0.044715 z^3): no cancellation where tanh u is near -1.
    return sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))


@triton.jit
def gelu_tanh_forward(z):
    return z * gelu_tanh_gate(z)


@triton.jit
def gelu_tanh_backward(dh, z):
    gate = gelu_tanh_gate(z)
    slope = 1.5957691216057308 * (1 + 3 * 0.044715 * z * z)
    return dh * (gate + z * gate * (1 - gate) * slope)


register_activation(
    "gelu_tanh",
    gelu_tanh_forward,
    gelu_tanh_backward,
    reference=lambda z: F.gelu(z, approximate="tanh"),
    module=nn.GELU,
    matches=lambda module: module.approximate == "tanh",
)


@triton.jit
def quick_gelu_forward(z):
    return z / (1 + tl.exp(-1.702 * z))


@triton.jit
def quick_gelu_backward(dh, z):
    gate = sigmoid(1.702 * z)
    return dh * gate * (1 + 1.702 * z * (1 - gate))


register_activation(
    "quick_gelu", quick_gelu_forward, quick_gelu_backward, reference=lambda z: z * torch.sigmoid(1.702 * z)
)


@triton.jit
def silu_forward(z):
    return z / (1 + tl.exp(-z))


@triton.jit
def silu_backward(dh, z):
    gate = sigmoid(z)
    return dh * gate * (1 + z * (1 - gate))


register_activation("silu", silu_forward, silu_backward, reference=lambda z: F.silu(z), module=nn.SiLU)


@triton.jit
def mish_gate(z):
    """(n, rest, d) with gate = tanh(softplus(z)) = n / d and 1 - gate = rest / d.

    They are computed from e = exp(-|z|) alone, so nothing overflows.
    """
    e = tl.exp(-tl.abs(z))
    n = tl.where(z < 0, e * (e + 2), 1 + 2 * e)
    rest = tl.where(z < 0, 2.0, 2 * e * e)
    return n, rest, n + rest


@triton.jit
def mish_forward(z):
    n, _, d = mish_gate(z)
    return z * (n / d)


@triton.jit
def mish_backward(dh, z):
    n, rest, d = mish_gate(z)
    gate = n / d
    return dh * (gate + z * sigmoid(z) * (rest / d) * (1 + gate))


@triton.jit
def mish_forward_and_slope(z):
    """z · gate(z) and its derivative, from one exponential and one division."""
    n, rest, d = mish_gate(z)
    e = tl.exp(-tl.abs(z))
    inverse = 1 / (d * (1 + e))
    gate = n * (1 + e) * inverse
    sigmoid_part = tl.where(z < 0, e, 1.0)  # sigmoid(z) = sigmoid_part / (1 + e)
    return z * gate, gate + z * (sigmoid_part * rest * inverse) * (1 + gate)


register_activation(
    "mish",
    mish_forward,
    mish_backward,
    forward_and_slope=mish_forward_and_slope,
    reference=lambda z: F.mish(z),
    module=nn.Mish,
)


@triton.jit
def sigmoid_backward(dh, h):
    return dh * h * (1 - h)


register_activation(
    "sigmoid",
    sigmoid,
    sigmoid_backward,
    saves="output",
    reference=lambda z: torch.sigmoid(z),
    reference_backward=lambda dh, h: dh * h * (1 - h),
    module=nn.Sigmoid,
)


@triton.jit
def softplus_forward(z, beta, threshold):
    scaled = z * beta
    smooth = (tl.where(scaled > 0, scaled, 0.0) + log1p_unit(tl.exp(-tl.abs(scaled)))) / beta
    return tl.where(scaled > threshold, z, smooth)


LINEAR_FROM = 17.0  # sigmoid is 1 in fp32 from here on: 1 - sigmoid(17) < 2^-24
SOFTPLUS_LINEAR = tl.constexpr(LINEAR_FROM)


@triton.jit
def softplus_backward(dh, saved, beta, threshold):
    if beta > 0 and threshold >= SOFTPLUS_LINEAR:
        slope = -expm1(-beta * saved)  # `saved` is the output h: sigmoid(beta z) = 1 - exp(-beta h)
    else:
        slope = tl.where(saved * beta > threshold, 1.0, sigmoid(saved * beta))
    return dh * slope


def _softplus_saves(beta: float, threshold: float) -> Saved:
    # With a smaller threshold the function jumps at the threshold, and h alone does not tell on which side of it z was.
    return "output" if beta > 0 and threshold >= LINEAR_FROM else "preactivation"


register_activation(
    "softplus",
    softplus_forward,
    softplus_backward,
    saves=_softplus_saves,
    reference=lambda z, beta, threshold: F.softplus(z, beta, threshold),
    reference_backward=lambda dh, h, beta, threshold: dh * -torch.expm1(-beta * h),
    parameters={"beta": 1.0, "threshold": 20.0},
    module=nn.Softplus,
    kinks=lambda beta, threshold: (threshold / beta,),
)


@triton.jit
def logsigmoid_forward(z):
    return tl.where(z < 0, z, 0.0) - log1p_unit(tl.exp(-tl.abs(z)))


@triton.jit
def logsigmoid_backward(dh, h):
    return dh * -expm1(h)  # sigmoid(-z) = 1 - exp(h)


register_activation(
    "logsigmoid",
    logsigmoid_forward,
    logsigmoid_backward,
    saves="output",
    reference=lambda z: F.logsigmoid(z),
    reference_backward=lambda dh, h: dh * -torch.expm1(h),
    module=nn.LogSigmoid,
)


@triton.jit
def tanh_backward(dh, h):
    return dh * (1 - h * h)


register_activation(
    "tanh",
    tanh,
    tanh_backward,
    saves="output",
    reference=lambda z: torch.tanh(z),
    reference_backward=lambda dh, h: dh * (1 - h * h),
    module=nn.Tanh,
)


@triton.jit
def tanhshrink_forward(z):
    return z - tanh(z)


@triton.jit
def tanhshrink_backward(dh, z):
    t = tanh(z)
    return dh * (t * t)


register_activation(
    "tanhshrink", tanhshrink_forward, tanhshrink_backward, reference=lambda z: F.tanhshrink(z), module=nn.Tanhshrink
)


@triton.jit
def softsign_forward(z):
    return z / (1 + tl.abs(z))


@triton.jit
def softsign_backward(dh, h):
    rest = 1 - tl.abs(h)
    return dh * (rest * rest)


register_activation(
    "softsign",
    softsign_forward,
    softsign_backward,
    saves="output",
    reference=lambda z: F.softsign(z),
    reference_backward=lambda dh, h: dh * (1 - h.abs()).square(),
    module=nn.Softsign,
)


@triton.jit
def softshrink_forward(z, lambd):
    return tl.where(z > lambd, z - lambd, tl.where(z < -lambd, z + lambd, z * 0.0))


@triton.jit
def softshrink_backward(dh, h, lambd):
    return tl.where(h == 0, 0.0, dh)


register_activation(
    "softshrink",
    softshrink_forward,
    softshrink_backward,
    saves="output",
    reference=lambda z, lambd: F.softshrink(z, lambd),
    reference_backward=lambda dh, h, lambd: dh.masked_fill(h == 0, 0),
    parameters={"lambd": 0.5},
    module=nn.Softshrink,
    kinks=lambda lambd: (-lambd, lambd),
    scales=True,
    piecewise=True,
)


@triton.jit
def hardshrink_forward(z, lambd):
    return tl.where((z >= -lambd) & (z <= lambd), 0.0, z)


@triton.jit
def hardshrink_backward(dh, h, lambd):
    return tl.where((h >= -lambd) & (h <= lambd), 0.0, dh)


register_activation(
    "hardshrink",
    hardshrink_forward,
    hardshrink_backward,
    saves="output",
    reference=lambda z, lambd: F.hardshrink(z, lambd),
    reference_backward=lambda dh, h, lambd: dh.masked_fill((h >= -lambd) & (h <= lambd), 0),
    parameters={"lambd": 0.5},
    module=nn.Hardshrink,
    kinks=lambda lambd: (-lambd, lambd),
    piecewise=True,
)


@triton.jit
def hardsigmoid_forward(z):
    return relu6_forward(z + 3) * (1 / 6)


@triton.jit
def hardsigmoid_backward(dh, h):
    return tl.where((h > 0) & (h < 1), dh * (1 / 6), 0.0)


register_activation(
    "hardsigmoid",
    hardsigmoid_forward,
    hardsigmoid_backward,
    saves="output",
    reference=lambda z: F.hardsigmoid(z),
    reference_backward=lambda dh, h: (dh / 6).masked_fill((h <= 0) | (h >= 1), 0),
    module=nn.Hardsigmoid,
    kinks=lambda: (-3.0, 3.0),
    piecewise=True,
)


@triton.jit
def hardswish_forward(z):
    return z * relu6_forward(z + 3) * (1 / 6)


@triton.jit
def hardswish_backward(dh, z):
    return tl.where(z <= -3, 0.0, tl.where(z < 3, dh * (z * (1 / 3) + 0.5), dh))


register_activation(
    "hardswish",
    hardswish_forward,
    hardswish_backward,
    reference=lambda z: F.hardswish(z),
    module=nn.Hardswish,
    kinks=lambda: (-3.0, 3.0),
    piecewise=True,
)


@triton.jit
def exp_forward(z):
    return tl.exp(z)


@triton.jit
def exp_backward(dh, h):
    return dh * h


register_activation(
    "exp",
    exp_forward,
    exp_backward,
    saves="output",
    reference=lambda z: torch.exp(z),
    reference_backward=lambda dh, h: dh * h,
)


@triton.jit
def sine_forward(z):
    return tl.sin(z)


@triton.jit
def sine_backward(dh, z):
    return dh * tl.cos(z)


register_activation("sine", sine_forward, sine_backward, reference=lambda z: torch.sin(z))


@triton.jit
def step_forward(z):
    return tl.where(
        z >= 0, 1.0, tl.where(z < 0, 0.0, z)
    )  # NaN fails both comparisons and stays NaN, so that a fault is seen


@triton.jit
def step_backward(dh, h):
    return tl.where(h == h, 0.0, dh)


register_activation(
    "step",
    step_forward,
    step_backward,
    saves="output",
    reference=lambda z: z.masked_fill(z >= 0, 1).masked_fill(z < 0, 0),
    reference_backward=lambda dh, h: dh.masked_fill(h == h, 0),
    kinks=lambda: (0.0,),
    piecewise=True,
)

BUILT_IN = frozenset(ACTIVATIONS)
IDENTITY = ACTIVATIONS["identity"]
