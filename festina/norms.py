"""Where a layer norm sits in a recurrent cell: `NormPlan` and the named plans.

With the same weights, two projects' "LayerNorm LSTM" are different functions if their norms sit in different places. So
the placement is data here: it has a name, every layer prints it, the checkpoint stores it, and loading compares it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

Placement = Literal["none", "separate", "joint"]
Groups = Literal["all", "gate", "gates|candidate"]
CellNorm = Literal["none", "readout", "carried"]
Kind = Literal["layer", "rms"]
Reset = Literal["normed", "product", "state"]


@dataclass(frozen=True)
class NormPlan:
    """Where the norms of a cell sit, which values share statistics, and the kind of norm.

    A norm is `N(v) = gain · (v − mean v) / sqrt(var v + eps)` with the biased variance; kind `rms` does not subtract the mean:
    `N(v) = gain · v / sqrt(mean v² + eps)`. Statistics are taken in float32 or wider.

    Args:
        placement: `none`; `separate`, one norm on `W_ih x_t` and one on `W_hh h_{t-1}`; `joint`, one norm on their sum.
        groups: the values that share a mean and a variance: `all` gates together (G·H values), each `gate` alone (H values),
            or `gates|candidate`, all gates but the last together and the last alone (Ba et al.'s GRU).
        cell: the norm on the LSTM's c: `none`; `readout`, only inside `h = o · tanh(N(c))`, the carried c stays raw;
            `carried`, the normalised c is the state. A cell without c ignores it.
        kind: `layer` or `rms`.
        eps: added to the variance (or to the mean square).
        inner_bias: add a bias inside the norm, on the input side: `N(W_ih x + bias_inner)` or
            `N(W_ih x + W_hh h + bias_inner)`.
        inner_bias_hh: the same on the side of h. It differs from `inner_bias` under separate norms, and if the reset gate
            multiplies the recurrent product.
        reset: what the GRU's reset gate multiplies: `normed`, the candidate's block after norm and shift (of the recurrent
            product; under a joint norm of the whole sum, as in Dreamer); `product`, the recurrent product before any norm;
            `state`, h before the product (Cho et al. 2014, v3). A cell without a reset gate ignores it.
        clip: the carried c is clamped to ±clip, after its norm. A cell without c ignores it.
        name: the name of the plan; comparison ignores it.

    Raises:
        TypeError: a field is of a wrong type: `eps` and `clip` are numbers, `inner_bias` and `inner_bias_hh` bools.
        ValueError: a field has an unknown value, `eps` or `clip` is not positive or not finite, a field has nothing to act
            on, or the candidate would be normalised together with the reset gate that it needs first.

    >>> NormPlan("separate", cell="readout") == HASTE
    True
    >>> HASTE.with_eps(1e-3)
    NormPlan(placement='separate', cell='readout', eps=0.001)
    """

    placement: Placement = "none"
    groups: Groups = "all"
    cell: CellNorm = "none"
    kind: Kind = "layer"
    eps: float = 1e-5
    inner_bias: bool = False
    inner_bias_hh: bool = False
    reset: Reset = "normed"
    clip: float | None = None
    name: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for what, values in (
            ("placement", get_args(Placement)),
            ("groups", get_args(Groups)),
            ("cell", get_args(CellNorm)),
            ("kind", get_args(Kind)),
            ("reset", get_args(Reset)),
        ):
            got = getattr(self, what)
            if not isinstance(got, str) or got not in values:
                raise ValueError(f"NormPlan {what} must be one of {', '.join(map(repr, values))}, got {got!r}")
        object.__setattr__(self, "eps", _positive("eps", self.eps, "it is added to the variance"))
        if self.clip is not None:
            object.__setattr__(self, "clip", _positive("clip", self.clip, "None for no clip"))
        for what in ("inner_bias", "inner_bias_hh"):
            if not isinstance(getattr(self, what), bool):
                raise TypeError(f"NormPlan {what} must be True or False, got {getattr(self, what)!r}")
        if self.name is not None and not isinstance(self.name, str):
            raise TypeError(f"NormPlan name must be a string or None, got {self.name!r}")
        if self.placement == "none" and (self.groups != "all" or self.inner_bias or self.inner_bias_hh):
            raise ValueError(
                "NormPlan groups, inner_bias and inner_bias_hh belong to a norm on the products, but placement is 'none'; "
                "choose 'separate' or 'joint', or leave them at their defaults"
            )
        if self.placement != "none" and self.groups == "all" and self.reset != "normed":
            raise ValueError(
                f"NormPlan reset {self.reset!r} needs the reset gate before the candidate is normalised, but groups 'all' "
                "normalises both together; choose 'gate' or 'gates|candidate'"
            )

    @property
    def is_none(self) -> bool:
        """True if the cell is that of `torch.nn`: no norm, no clip, and the reset gate as there."""
        return replace(self, eps=NONE.eps) == NONE

    def with_eps(self, eps: float) -> NormPlan:
        """The same plan with another eps; a changed plan has no name."""
        return self if eps == self.eps else replace(self, eps=eps, name=None)

    def spans(self, gates: int) -> list[tuple[int, int]]:
        """The groups of gates that share statistics, as (first, last + 1) pairs.

        >>> NormPlan("separate", groups="gates|candidate").spans(3)
        [(0, 2), (2, 3)]
        """
        if self.groups == "all":
            return [(0, gates)]
        if self.groups == "gate":
            return [(g, g + 1) for g in range(gates)]
        return [(0, gates - 1), (gates - 1, gates)]

    def to_dict(self) -> dict[str, Any]:
        """All fields but the name; `from_dict` is the inverse."""
        fields = asdict(self)
        del fields["name"]
        return fields

    def to_json(self) -> str:
        """The plan as one line of JSON, as checkpoints store it."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> NormPlan:
        """The inverse of `to_json`; the result has a name if a named plan equals it.

        Raises:
            TypeError, ValueError: the text is not JSON, or the JSON not the fields of a plan.
        """
        plan = cls.from_dict(parse_object(text))
        return next((named for named in PLANS.values() if named == plan), plan)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> NormPlan:
        """The inverse of `to_dict`; fields that are missing have their defaults.

        Raises:
            TypeError, ValueError: `fields` are not those of a plan.
        """
        if not isinstance(fields, dict):
            raise TypeError(f"a norm plan must be an object with fields, got {type(fields).__name__}")
        known = NONE.to_dict()  # without the name, which would make any plan print as another one
        unknown = [name for name in fields if name not in known]
        if unknown:
            raise ValueError(
                f"NormPlan must have the fields {', '.join(known)} alone, got {', '.join(map(repr, unknown))}; it may be "
                "of a newer version of festina"
            )
        return cls(**fields)

    def __str__(self) -> str:
        return self.name or repr(self)

    def __repr__(self) -> str:
        if self.name:
            return f"norms.{self.name}"
        default = NONE.to_dict()
        return f"NormPlan({', '.join(f'{key}={v!r}' for key, v in self.to_dict().items() if v != default[key])})"


def _positive(what: str, value: float, why: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"NormPlan {what} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not 0 < number < math.inf:
        raise ValueError(f"NormPlan {what} must be finite and greater than 0 ({why}), got {number!r}")
    return number


def parse_object(text: str) -> dict[str, Any]:
    """Parse JSON that must be an object.

    Raises:
        ValueError: it is not JSON, or nested too deeply to be read.
        TypeError: it is another value.
    """
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None
    if not isinstance(found, dict):
        raise TypeError(f"the JSON must be an object, got {type(found).__name__}")
    return found


NONE = NormPlan(name="NONE")
"""No norm: the plain cell of `torch.nn`."""

# Plans of the LSTM; some fit the GRU as well.

HASTE = NormPlan("separate", cell="readout", name="HASTE")
"""haste's LayerNormLSTM, LayerNormGRU and LayerNormIndRNN, and the default of Festina's. The LSTM's equations are those of
Ba et al. 2016, supplement (20)-(22), and of lnlstm in OpenAI baselines and stable-baselines."""

BA2016 = NormPlan("separate", cell="readout", name="BA2016")
"""Ba et al. 2016, supplement (20)-(22), the LSTM: the same function as `HASTE`."""

BA2016_DRAW = NormPlan(cell="readout", name="BA2016_DRAW")
"""Ba et al. 2016, supplement, the DRAW experiment: a plain LSTM with one norm, on c in the output."""

LNLSTM = NormPlan("separate", cell="readout", inner_bias=True, name="LNLSTM")
"""The code that Ba et al. published (ryankiros/layer-norm, layers.py, lnlstm_layer): `HASTE` with a bias inside the input's
norm as well."""

SOCKEYE = NormPlan("separate", cell="readout", eps=1e-6, inner_bias=True, inner_bias_hh=True, name="SOCKEYE")
"""Sockeye 1's LayerNormLSTMCell and LayerNormGRUCell: both biases inside the norms."""

MARIAN = NormPlan("separate", eps=1e-9, name="MARIAN")
"""Marian's LSTM and GRU under --layer-normalization: no norm on c, eps 1e-9."""

DING = NormPlan("separate", name="DING")
"""DI-engine's LSTM with norm_type LN: no norm on c."""

FASTRNNS = NormPlan("separate", cell="carried", name="FASTRNNS")
"""PyTorch's benchmarks/fastrnns/custom_lstms.py, and its copies in NeMo and DI-star: the normalised c is the state."""

TFA = NormPlan("separate", cell="carried", eps=1e-3, name="TFA")
"""TensorFlow Addons' LayerNormLSTMCell: `FASTRNNS` with Keras' eps."""

RETURNN = NormPlan("separate", cell="carried", eps=1e-12, name="RETURNN")
"""RETURNN's LayerNormVariantsLSTMCell with global_norm and cell_norm."""

RETURNN_JOINED = NormPlan("joint", cell="carried", eps=1e-12, name="RETURNN_JOINED")
"""RETURNN's LayerNormVariantsLSTMCell with global_norm_joined and cell_norm."""

TORCHAUDIO = NormPlan("joint", cell="carried", name="TORCHAUDIO")
"""torchaudio's _CustomLSTM (RNN-T predictors). Its emformer_rnnt_base sets eps 1e-3: `TORCHAUDIO.with_eps(1e-3)`."""

SONNET = NormPlan("joint", name="SONNET")
"""DeepMind Sonnet 1's LSTM with use_layer_norm: one norm on the sum, none on c."""

CAFFE2 = NormPlan("joint", eps=1e-4, inner_bias=True, name="CAFFE2")
"""Caffe2's LayerNormLSTMCell: `SONNET` with the biases inside the norm."""

ICEFALL = NormPlan("joint", groups="gate", cell="carried", inner_bias=True, name="ICEFALL")
"""icefall's LayerNormLSTMCell, after Li et al. 2019 (arXiv 1909.12415): each gate normalised alone, biases inside the norm."""

TF_CONTRIB = NormPlan("joint", groups="gate", cell="carried", eps=1e-12, name="TF_CONTRIB")
"""tf.contrib.rnn.LayerNormBasicLSTMCell, and RETURNN's LayerNormVariantsLSTMCell with per_gate_norm: each gate normalised
alone, eps 1e-12."""

SKETCH_RNN = NormPlan("joint", groups="gate", cell="readout", eps=1e-3, name="SKETCH_RNN")
"""Magenta's sketch_rnn, LayerNormLSTMCell: each gate normalised alone, the carried c stays raw."""

SOCKEYE_PER_GATE = NormPlan("joint", groups="gate", cell="readout", eps=1e-6, inner_bias=True, name="SOCKEYE_PER_GATE")
"""Sockeye 1's LayerNormPerGateLSTMCell."""

LINGVO = NormPlan("joint", groups="gate", eps=1e-8, clip=10.0, name="LINGVO")
"""Lingvo's LayerNormalizedLSTMCellSimple: each gate normalised alone, no norm on c, c clipped at ±10."""

LINGVO_LEAN = NormPlan("joint", groups="gate", cell="readout", eps=1e-8, name="LINGVO_LEAN")
"""Lingvo's LayerNormalizedLSTMCellLean: no clip, a norm on c in the output."""

TFLITE = NormPlan("joint", groups="gate", eps=1e-8, name="TFLITE")
"""The LSTM of TensorFlow Lite and NNAPI with layer norm coefficients: `LINGVO` without a clip."""

# Plans of the GRU alone.

BA2016_GRU = NormPlan("separate", groups="gates|candidate", name="BA2016_GRU")
"""Ba et al. 2016, supplement, the GRU: r and z share statistics, the candidate has its own."""

LNGRU = NormPlan("separate", groups="gates|candidate", inner_bias=True, name="LNGRU")
"""The code that Ba et al. published (ryankiros/layer-norm, layers.py, lngru_layer), and Nematus: `BA2016_GRU` with the biases
inside the input's norms."""

NEMATUS_STATE = NormPlan("separate", groups="gates|candidate", inner_bias_hh=True, name="NEMATUS_STATE")
"""Nematus' Theano-compatible cells, which add the biases to the recurrent products: inside h's norms."""

DREAMER = NormPlan("joint", eps=1e-3, name="DREAMER")
"""The GRU of DreamerV3 (2023): candidate tanh(σ(r)·n), update σ(z − 1); see `reference.gru_joint_step`."""

SHEEPRL = NormPlan("joint", eps=1e-3, name="SHEEPRL")
"""sheeprl's LayerNormGRUCell without a bias: the same function as `DREAMER`."""

DREAMER_V2 = NormPlan("joint", eps=1e-3, inner_bias=True, name="DREAMER_V2")
"""The GRU of DreamerV2, and sheeprl's LayerNormGRUCell with a bias: `DREAMER` with the linear layer's bias inside the norm."""

ICEFALL_GRU = NormPlan("joint", groups="gate", inner_bias=True, inner_bias_hh=True, reset="product", name="ICEFALL_GRU")
"""icefall's LayerNormGRUCell: each gate normalised alone, n = tanh(N(x_n + r·h_n)), biases inside."""

LINGVO_GRU = NormPlan("joint", groups="gate", eps=1e-8, reset="state", name="LINGVO_GRU")
"""Lingvo's GRUCell with apply_layer_norm: each gate normalised alone, the reset gate before the product."""

RESET_BEFORE = NormPlan(reset="state", name="RESET_BEFORE")
"""No norm; the GRU of Cho et al. 2014 (arXiv 1406.1078v3) and of Keras with reset_after=False."""

PLANS: dict[str, NormPlan] = {
    name: plan for name, plan in list(globals().items()) if isinstance(plan, NormPlan) and plan.name == name
}
"""Every named plan. If two names mean the same function, a checkpoint is read back under the first."""
