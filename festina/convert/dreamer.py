"""The GRU of the Dreamer family: gates reset, candidate, update, one linear layer over x and h.

DreamerV3 since 2024 is another cell, without a norm on the gates and with block-diagonal weights.
"""

from __future__ import annotations

from festina.convert.engine import Table
from festina.convert.layout import Layout, columns, flip
from festina.norms import DREAMER, DREAMER_V2
from festina.spec import GRU


def joined(order: str) -> Layout:
    """Both weights concatenated by columns, those of x first (`xh`) or those of h first (`hx`).

    Raises:
        ValueError: `order` is neither.
    """
    orders = {"xh": ("weight_ih", "weight_hh"), "hx": ("weight_hh", "weight_ih")}
    if order not in orders:
        raise ValueError(f"order must be 'xh' or 'hx', got {order!r}")
    return columns(*orders[order])


def dreamerv3_torch(eps: float = 1e-3, order: str = "xh") -> Table:
    """NM512/dreamerv3-torch, networks.py, GRUCell with norm=True.

    Args:
        eps: the eps of its nn.LayerNorm.
        order: which columns of the linear layer come first, those of x (`xh`) or those of h (`hx`).
    """
    return Table(
        GRU,
        DREAMER.with_eps(eps),
        "rnz",
        {
            "layers.GRU_linear.weight": joined(order),
            "layers.GRU_norm.weight": "gain_joint",
            "layers.GRU_norm.bias": "bias_joint",
        },
        aliases={
            "layers.GRU_linear.weight": "_layer.weight",
            "layers.GRU_norm.weight": "_norm.weight",
            "layers.GRU_norm.bias": "_norm.bias",
        },
    )


def dreamerv2(eps: float = 1e-3, order: str = "xh") -> Table:
    """danijar/dreamerv2, dreamerv2/common/nets.py, GRUCell with norm=True: a Keras Dense layer and LayerNormalization.

    DreamerV3 of 2023 is this cell without the bias and with `order="hx"`.

    Args:
        eps: the eps of its LayerNormalization.
        order: which rows of the kernel come first, those of x (`xh`) or those of h (`hx`).
    """
    return Table(
        GRU,
        DREAMER_V2.with_eps(eps),
        "rnz",
        {
            "dense/kernel": flip(joined(order)),
            "dense/bias?": "bias_inner",
            "layer_normalization/gamma": "gain_joint",
            "layer_normalization/beta": "bias_joint",
        },
    )


FORMATS = {"dreamerv3_torch.GRUCell": dreamerv3_torch, "dreamerv2.GRUCell": dreamerv2}
