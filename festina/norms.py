"""Where a layer norm sits in a recurrent cell: `NormPlan` and the plans that have a name.

Two projects' "LayerNorm LSTM" with the same weights are different functions as soon as their norms sit in different
places. So the place is data here: it has a name, is printed by every layer, is saved with the checkpoint and is
compared on load.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

Placement = Literal["none", "separate", "joint"]
Groups = Literal["all", "gate", "gates|candidate"]
CellNorm = Literal["none", "readout", "carried"]
Kind = Literal["layer", "rms"]


@dataclass(frozen=True)
class NormPlan:
    """Where the norms of a cell sit, over what they take their statistics, and of which kind they are.

    A norm is `N(v) = gain · (v − mean v) / sqrt(var v + eps)` with the biased variance; kind `rms` leaves the mean in:
    `N(v) = gain · v / sqrt(mean v² + eps)`. Statistics are taken in float32 or wider.

    Args:
        placement: `none`; `separate`, one norm on `W_ih x_t` and one on `W_hh h_{t-1}`; `joint`, one norm on their sum.
        groups: what shares one mean and variance: `all` gates together (G·H values), each `gate` alone (H values), or
            `gates|candidate`, all gates but the last together and the last alone (Ba et al.'s GRU).
        cell: the norm on the LSTM's c: `none`; `readout`, only inside `h = o · tanh(N(c))`, the carried c stays raw;
            `carried`, the normalised c is the state. A cell without c has no such norm, whatever stands here.
        kind: `layer` or `rms`.
        eps: added to the variance (or to the mean square).
        inner_bias: add a bias inside the norm, on the side of the input: `N(W_ih x + bias_inner)` or
            `N(W_ih x + W_hh h + bias_inner)`.
        name: what the plan is called; it does not count when plans are compared.

    Raises:
        ValueError: a field holds none of its values, `eps` is not positive, or a field has nothing to act on.

    >>> NormPlan("separate", cell="readout") == HASTE
    True
    >>> HASTE.with_eps(1e-3)
    NormPlan(placement='separate', groups='all', cell='readout', kind='layer', eps=0.001, inner_bias=False)
    """

    placement: Placement = "none"
    groups: Groups = "all"
    cell: CellNorm = "none"
    kind: Kind = "layer"
    eps: float = 1e-5
    inner_bias: bool = False
    name: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for what, values in (
            ("placement", get_args(Placement)),
            ("groups", get_args(Groups)),
            ("cell", get_args(CellNorm)),
            ("kind", get_args(Kind)),
        ):
            got = getattr(self, what)
            if got not in values:
                raise ValueError(f"NormPlan {what} must be one of {', '.join(map(repr, values))}, got {got!r}")
        if not self.eps > 0:
            raise ValueError(f"NormPlan eps must be greater than 0 (it is added to the variance), got {self.eps!r}")
        if self.placement == "none" and (self.groups != "all" or self.inner_bias):
            raise ValueError(
                "NormPlan groups and inner_bias belong to a norm on the products, but placement is 'none'; "
                "choose 'separate' or 'joint', or leave them at their defaults"
            )

    @property
    def is_none(self) -> bool:
        """True where there is no norm at all: the cell is the plain one."""
        return self.placement == "none" and self.cell == "none"

    def with_eps(self, eps: float) -> NormPlan:
        """The same plan with another eps, and no name of its own."""
        return replace(self, eps=eps, name=None)

    def spans(self, gates: int) -> list[tuple[int, int]]:
        """The groups of gates that share statistics, as (first, past the last) pairs.

        >>> NormPlan("separate", groups="gates|candidate").spans(3)
        [(0, 2), (2, 3)]
        """
        if self.groups == "all":
            return [(0, gates)]
        if self.groups == "gate":
            return [(g, g + 1) for g in range(gates)]
        return [(0, gates - 1), (gates - 1, gates)]

    def to_dict(self) -> dict[str, Any]:
        """The fields that make the plan, without its name; `NormPlan(**fields)` gives it back."""
        fields = asdict(self)
        del fields["name"]
        return fields

    def to_json(self) -> str:
        """The plan as one line of JSON: what a checkpoint holds."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> NormPlan:
        """The plan that `to_json` wrote, under its name if it has one."""
        plan = cls(**json.loads(text))
        return next((named for named in PLANS.values() if named == plan), plan)

    def __str__(self) -> str:
        return self.name or repr(self)

    def __repr__(self) -> str:
        if self.name:
            return f"norms.{self.name}"
        return f"NormPlan({', '.join(f'{key}={value!r}' for key, value in self.to_dict().items())})"


NONE = NormPlan(name="NONE")
"""No norm: the plain cell of `torch.nn`."""

HASTE = NormPlan("separate", cell="readout", name="HASTE")
"""haste's LayerNormLSTM, LayerNormGRU and LayerNormIndRNN, and the default of Festina's. The LSTM's equations are those of
Ba et al. 2016, supplement (20)-(22), and of OpenAI baselines' lnlstm."""

BA2016 = NormPlan("separate", cell="readout", name="BA2016")
"""Ba et al. 2016, supplement (20)-(22), the LSTM: the same function as `HASTE`."""

BA2016_GRU = NormPlan("separate", groups="gates|candidate", name="BA2016_GRU")
"""Ba et al. 2016, supplement, the GRU: r and z share statistics, the candidate has its own."""

FASTRNNS = NormPlan("separate", cell="carried", name="FASTRNNS")
"""PyTorch's benchmarks/fastrnns/custom_lstms.py, and its copies in NeMo and DI-star: the normalised c is the state."""

TFA = NormPlan("separate", cell="carried", eps=1e-3, name="TFA")
"""TensorFlow Addons' LayerNormLSTMCell: `FASTRNNS` with Keras' eps."""

TORCHAUDIO = NormPlan("joint", cell="carried", name="TORCHAUDIO")
"""torchaudio's _CustomLSTM (RNN-T predictors). Its emformer_rnnt_base sets eps 1e-3: `TORCHAUDIO.with_eps(1e-3)`."""

ICEFALL = NormPlan("joint", groups="gate", cell="carried", inner_bias=True, name="ICEFALL")
"""icefall's LayerNormLSTMCell, after Li et al. 2019 (arXiv 1909.12415): every gate on its own, biases inside the norm."""

TF_CONTRIB = NormPlan("joint", groups="gate", cell="carried", eps=1e-12, name="TF_CONTRIB")
"""tf.contrib.rnn.LayerNormBasicLSTMCell: every gate on its own, eps 1e-12."""

DREAMER = NormPlan("joint", eps=1e-3, name="DREAMER")
"""The GRU of DreamerV2 and DreamerV3 (2023): candidate tanh(σ(r)·n), update σ(z − 1). `reference.gru_joint_step` has it."""

SHEEPRL = NormPlan("joint", eps=1e-3, name="SHEEPRL")
"""sheeprl's LayerNormGRUCell: the same function as `DREAMER`."""

PLANS: dict[str, NormPlan] = {
    plan.name: plan
    for plan in (NONE, HASTE, BA2016, BA2016_GRU, FASTRNNS, TFA, TORCHAUDIO, ICEFALL, TF_CONTRIB, DREAMER, SHEEPRL)
    if plan.name
}
"""Every named plan. Where two names mean the same function, the first one is the one that is read back."""
