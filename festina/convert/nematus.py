"""The GRU that Ba et al. published (ryankiros/layer-norm, layers.py) and that Nematus adopted (nematus/layers.py).

Kernels are [in, out]; one tensor holds the gates r and u (Festina's z), another the candidate. Names are those of the Theano
parameters without the `prefix`, such as `encoder_`.
"""

from __future__ import annotations

from festina.convert.engine import Table
from festina.convert.layout import Block, flip
from festina.norms import LNGRU
from festina.spec import GRU


def _lngru(norm: str) -> Table:
    """The table, with `norm` as the prefix of the norms' names b1 to b4 and s1 to s4."""
    return Table(
        GRU,
        LNGRU,
        "rzn",
        {
            "W": flip(Block("weight_ih", "rz")),
            "Wx": flip(Block("weight_ih", "n")),
            "U": flip(Block("weight_hh", "rz")),
            "Ux": flip(Block("weight_hh", "n")),
            "b": Block("bias_inner", "rz"),
            "bx": Block("bias_inner", "n"),
            f"{norm}s1": Block("gain_ih", "rz"),
            f"{norm}b1": Block("bias_ih", "rz"),
            f"{norm}s2": Block("gain_ih", "n"),
            f"{norm}b2": Block("bias_ih", "n"),
            f"{norm}s3": Block("gain_hh", "rz"),
            f"{norm}b3": Block("bias_hh", "rz"),
            f"{norm}s4": Block("gain_hh", "n"),
            f"{norm}b4": Block("bias_hh", "n"),
        },
    )


def lngru() -> Table:
    """ryankiros/layer-norm, layers.py, lngru_layer."""
    return _lngru("")


def gru() -> Table:
    """Nematus, nematus/layers.py, gru_layer with layer_normalisation; not its conditional GRU."""
    return _lngru("ln_")


FORMATS = {"ryankiros.lngru": lngru, "nematus.gru": gru}
