# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"
"""The arithmetic of the cells for Triton, each cell once: forward, and backward by hand.

A cell has two halves: `update`, from the pre-activations to the state that it carries, and `emit`, from that state to
h; the norm on c sits between them. A cell that carries h alone updates h, and its `emit` returns it unchanged.

x and h are the pre-activations from x and from h, tuples with one tile per gate in the order of the spec. If the norm is
joint, x is their normalised sum and h is zero. `s` is the old state. `d_` marks gradients; `emit_backward` hands `d_late`
to `update_backward`: the gradient of a gate that acts only after the norm on c.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.jit
def tanh(v):
    """By exp, which loses digits near 0, and below 1/4 by a series, whose next term is under 1e-8 of v there."""
    t = tl.exp(-2 * tl.abs(v))
    u = v * v
    series = v * (1 + u * (-1 / 3 + u * (2 / 15 + u * (-17 / 315 + u * (62 / 2835)))))
    return tl.where(tl.abs(v) < 0.25, series, tl.where(v < 0, t - 1, 1 - t) / (1 + t))


@triton.jit
def lstm_update(x, h, s):
    i, f, g = tl.sigmoid(x[0] + h[0]), tl.sigmoid(x[1] + h[1]), tanh(x[2] + h[2])
    return f * s + i * g


@triton.jit
def lstm_emit(x, h, c):
    return tl.sigmoid(x[3] + h[3]) * tanh(c)


@triton.jit
def lstm_emit_backward(x, h, c, d):
    o, c = tl.sigmoid(x[3] + h[3]), tanh(c)
    return d * o * (1 - c * c), d * c * o * (1 - o)


@triton.jit
def lstm_update_backward(x, h, s, d, d_late):
    i, f, g = tl.sigmoid(x[0] + h[0]), tl.sigmoid(x[1] + h[1]), tanh(x[2] + h[2])
    d_a = (d * g * i * (1 - i), d * s * f * (1 - f), d * i * (1 - g * g), d_late)
    return d_a, d_a, d * f


@triton.jit
def gru_update(x, h, s):
    r, z = tl.sigmoid(x[0] + h[0]), tl.sigmoid(x[1] + h[1])
    n = tanh(x[2] + r * h[2])
    return z * s + (1 - z) * n


@triton.jit
def gru_update_backward(x, h, s, d, d_late):
    r, z = tl.sigmoid(x[0] + h[0]), tl.sigmoid(x[1] + h[1])
    n = tanh(x[2] + r * h[2])
    d_n = d * (1 - z) * (1 - n * n)
    d_r, d_z = d_n * h[2] * r * (1 - r), d * (s - n) * z * (1 - z)
    return (d_r, d_z, d_n), (d_r, d_z, d_n * r), d * z


@triton.jit
def gru_joint_update(x, h, s):
    r, z = tl.sigmoid(x[0]), tl.sigmoid(x[1] - 1)
    n = tanh(r * x[2])
    return z * n + (1 - z) * s


@triton.jit
def gru_joint_update_backward(x, h, s, d, d_late):
    r, z = tl.sigmoid(x[0]), tl.sigmoid(x[1] - 1)
    n = tanh(r * x[2])
    d_rn = d * z * (1 - n * n)
    d_a = (d_rn * x[2] * r * (1 - r), d * (n - s) * z * (1 - z), d_rn * r)
    return d_a, d_a, d * (1 - z)


@triton.jit
def indrnn_update(x, h, s):
    return tanh(x[0] + h[0])


@triton.jit
def indrnn_update_backward(x, h, s, d, d_late):
    a = tanh(x[0] + h[0])
    d_a = (d * (1 - a * a),)
    return d_a, d_a, tl.zeros_like(d)


@triton.jit
def indrnn_relu_update(x, h, s):
    a = x[0] + h[0]
    return tl.where(a < 0, 0.0, a)


@triton.jit
def indrnn_relu_update_backward(x, h, s, d, d_late):
    d_a = (tl.where(x[0] + h[0] > 0, d, 0.0),)
    return d_a, d_a, tl.zeros_like(d)


@triton.jit
def emit_state(x, h, s):
    return s


@triton.jit
def emit_state_backward(x, h, s, d):
    return d, d


class Cell(NamedTuple):
    """The two halves of a cell and their backward; kernels take the four as constants."""

    update: Any
    update_backward: Any
    emit: Any = emit_state
    emit_backward: Any = emit_state_backward


CELLS = {
    "lstm": Cell(lstm_update, lstm_update_backward, lstm_emit, lstm_emit_backward),
    "gru": Cell(gru_update, gru_update_backward),
    "gru_joint": Cell(gru_joint_update, gru_joint_update_backward),
    "indrnn": Cell(indrnn_update, indrnn_update_backward),
    "indrnn_relu": Cell(indrnn_relu_update, indrnn_relu_update_backward),
}
"""The cells by the names of `CellSpec.steps`."""

SOURCE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
"""A digest of this file, which changes with every cell: see `Plan.source`."""
