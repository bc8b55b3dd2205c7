"""Eclectic-Sheep/sheeprl, sheeprl/models/models.py: the GRU of its Dreamer agents, gates reset, candidate, update."""

from __future__ import annotations

from festina.convert.dreamer import joined
from festina.convert.engine import Table
from festina.norms import DREAMER_V2
from festina.spec import GRU


def layer_norm_gru_cell(eps: float = 1e-3, order: str = "hx") -> Table:
    """LayerNormGRUCell; without a bias (DreamerV3) the plan is `DREAMER`, with one (DreamerV2) `DREAMER_V2`.

    Args:
        eps: the eps of its layer norm: 1e-3 in DreamerV3's configuration, 1e-5 by default.
        order: which columns of the linear layer come first, those of h (`hx`) or those of x (`xh`).
    """
    return Table(
        GRU,
        DREAMER_V2.with_eps(eps),
        "rnz",
        {
            "linear.weight": joined(order),
            "linear.bias?": "bias_inner",
            "layer_norm.weight": "gain_joint",
            "layer_norm.bias": "bias_joint",
        },
    )


FORMATS = {"sheeprl.LayerNormGRUCell": layer_norm_gru_cell}
