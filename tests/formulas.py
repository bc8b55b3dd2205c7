"""The cells of other projects, one step at a time, written from their sources.

Each entry names the project and file that it follows. `step(p, x, h, c)` takes the project's tensors by the project's names
and returns the new h and, for an LSTM, the new c. Nothing of festina is used here, so that `festina.convert` can be tested
against it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, sigmoid, tanh

I, H, P = 3, 5, 4  # three different sizes, so that none can be mistaken for another
Parameters = dict[str, Tensor]
Step = Callable[[Parameters, Tensor, Tensor, Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Formula:
    """One project's cell.

    Args:
        format: its name in `festina.convert`.
        source: project and file.
        shapes: the shapes of its tensors.
        step: its step.
        options: the options of `convert.load`.
        has_c: it is an LSTM.
        width: width of h.
    """

    format: str
    source: str
    shapes: dict[str, tuple[int, ...]]
    step: Step
    options: dict[str, Any] = field(default_factory=dict)
    has_c: bool = True
    width: int = H

    def __str__(self) -> str:
        return "-".join([self.format, *(f"{key}={value}" for key, value in self.options.items())])


def ln(v: Tensor, gain: Tensor | float, shift: Tensor | float, eps: float) -> Tensor:
    centred = v - v.mean(-1, keepdim=True)
    return gain * centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps) + shift


def lstm_c(i: Tensor, f: Tensor, g: Tensor, c: Tensor) -> Tensor:
    return sigmoid(f) * c + sigmoid(i) * tanh(g)


def haste_lstm(p: Parameters, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    kernel, recurrent = p["kernel"][:I], p["kernel"][I:]
    i, g, f, o = (x @ kernel + h @ recurrent + p["bias"]).chunk(4, -1)
    c = lstm_c(i, f, g, c)
    return sigmoid(o) * tanh(c), c


def haste_layer_norm_lstm(p: Parameters, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    kernel, recurrent = p["kernel"][:I], p["kernel"][I:]
    v = ln(x @ kernel, p["gamma"][0], 0.0, 1e-5) + ln(h @ recurrent, p["gamma"][1], 0.0, 1e-5) + p["bias"]
    i, g, f, o = v.chunk(4, -1)
    c = lstm_c(i, f, g, c)
    return sigmoid(o) * tanh(ln(c, p["gamma_h"], p["beta_h"], 1e-5)), c


def haste_gru(p: Parameters, x: Tensor, h: Tensor, c: None) -> tuple[Tensor, None]:
    bias, recurrent_bias = p["bias"].chunk(2)
    vx, vh = x @ p["kernel"][:I], h @ p["kernel"][I:]
    if "gamma" in p:
        vx, vh = ln(vx, p["gamma"][0], 0.0, 1e-5), ln(vh, p["gamma"][1], 0.0, 1e-5)
    zx, rx, gx = (vx + bias).chunk(3, -1)
    zh, rh, gh = (vh + recurrent_bias).chunk(3, -1)
    z = sigmoid(zx + zh)
    return z * h + (1 - z) * tanh(gx + sigmoid(rx + rh) * gh), None


def haste_indrnn(p: Parameters, x: Tensor, h: Tensor, c: None) -> tuple[Tensor, None]:
    v = x @ p["kernel"]
    if "gamma" in p:
        v = ln(v, p["gamma"][0], 0.0, 1e-5)
    return tanh(v + p["bias"] + p["recurrent_scale"] * h), None


def fastrnns(p: Parameters, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    a = ln(x @ p["weight_ih"].t(), p["layernorm_i.weight"], p["layernorm_i.bias"], 1e-5)
    a = a + ln(h @ p["weight_hh"].t(), p["layernorm_h.weight"], p["layernorm_h.bias"], 1e-5)
    i, f, g, o = a.chunk(4, -1)
    c = ln(lstm_c(i, f, g, c), p["layernorm_c.weight"], p["layernorm_c.bias"], 1e-5)
    return sigmoid(o) * tanh(c), c


def icefall_lstm(p: Parameters, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    a = x @ p["weight_ih"].t() + h @ p["weight_hh"].t()
    parts = zip(a.chunk(4, -1), ("i", "f", "cx", "o"))
    i, f, g, o = (ln(v, p[f"layernorm_{name}.weight"], p[f"layernorm_{name}.bias"], 1e-5) for v, name in parts)
    c = ln(lstm_c(i, f, g, c), p["layernorm_cy.weight"], p["layernorm_cy.bias"], 1e-5)
    return sigmoid(o) * tanh(c), c


def icefall_gru(p: Parameters, x: Tensor, h: Tensor, c: None) -> tuple[Tensor, None]:
    xr, xi, xn = (x @ p["weight_ih"].t() + p["bias_ih"]).chunk(3, -1)
    hr, hi, hn = (h @ p["weight_hh"].t() + p["bias_hh"]).chunk(3, -1)
    r = sigmoid(ln(xr + hr, p["layernorm_r.weight"], p["layernorm_r.bias"], 1e-5))
    i = sigmoid(ln(xi + hi, p["layernorm_i.weight"], p["layernorm_i.bias"], 1e-5))
    n = tanh(ln(xn + r * hn, p["layernorm_n.weight"], p["layernorm_n.bias"], 1e-5))
    return n + i * (h - n), None


def torchaudio(p: Parameters, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    a = x @ p["x2g.weight"].t() + h @ p["p2g.weight"].t()
    i, f, g, o = ln(a, p["g_norm.weight"], p["g_norm.bias"], 1e-3).chunk(4, -1)
    c = ln(lstm_c(i, f, g, c), p["c_norm.weight"], p["c_norm.bias"], 1e-3)
    return sigmoid(o) * tanh(c), c


def torchaudio_plain(p: Parameters, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (x @ p["x2g.weight"].t() + p["x2g.bias"] + h @ p["p2g.weight"].t()).chunk(4, -1)
    c = lstm_c(i, f, g, c)
    return sigmoid(o) * tanh(c), c


def dreamer(a: Tensor, h: Tensor) -> tuple[Tensor, None]:
    reset, cand, update = a.chunk(3, -1)
    cand = tanh(sigmoid(reset) * cand)
    update = sigmoid(update - 1)
    return update * cand + (1 - update) * h, None


def sheeprl(p: Parameters, x: Tensor, h: Tensor, c: None) -> tuple[Tensor, None]:
    a = torch.cat([h, x], -1) @ p["linear.weight"].t()
    return dreamer(ln(a, p["layer_norm.weight"], p["layer_norm.bias"], 1e-3), h)


def dreamerv3_torch(p: Parameters, x: Tensor, h: Tensor, c: None) -> tuple[Tensor, None]:
    a = torch.cat([x, h], -1) @ p["layers.GRU_linear.weight"].t()
    return dreamer(ln(a, p["layers.GRU_norm.weight"], p["layers.GRU_norm.bias"], 1e-3), h)


def dreamerv2(p: Parameters, x: Tensor, h: Tensor, c: None) -> tuple[Tensor, None]:
    a = torch.cat([x, h], -1) @ p["dense/kernel"] + p["dense/bias"]
    return dreamer(ln(a, p["layer_normalization/gamma"], p["layer_normalization/beta"], 1e-3), h)


def ding(p: Parameters, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    a = ln(x @ p["wx.0"], p["norm.0.weight"], p["norm.0.bias"], 1e-5)
    a = a + ln(h @ p["wh.0"], p["norm.1.weight"], p["norm.1.bias"], 1e-5) + p["bias"][0]
    i, f, o, u = a.chunk(4, -1)
    c = lstm_c(i, f, u, c)
    return sigmoid(o) * tanh(c), c


def baselines(p: Parameters, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    a = ln(x @ p["wx"], p["gx"], p["bx"], 1e-5) + ln(h @ p["wh"], p["gh"], p["bh"], 1e-5) + p["b"]
    i, f, o, u = a.chunk(4, -1)
    c = lstm_c(i, f, u, c)
    return sigmoid(o) * tanh(ln(c, p["gc"], p["bc"], 1e-5)), c


def tfa(p: Parameters, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    a = ln(x @ p["kernel"], p["kernel_norm/gamma"], p["kernel_norm/beta"], 1e-3)
    a = a + ln(h @ p["recurrent_kernel"], p["recurrent_norm/gamma"], p["recurrent_norm/beta"], 1e-3) + p["bias"]
    i, f, g, o = a.chunk(4, -1)
    c = ln(lstm_c(i, f, g, c), p["state_norm/gamma"], p["state_norm/beta"], 1e-3)
    return sigmoid(o) * tanh(c), c


def keras_lstm(p: Parameters, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (x @ p["kernel"] + h @ p["recurrent_kernel"] + p["bias"]).chunk(4, -1)
    c = lstm_c(i, f, g, c)
    return sigmoid(o) * tanh(c), c


def keras_gru_after(p: Parameters, x: Tensor, h: Tensor, c: None) -> tuple[Tensor, None]:
    xz, xr, xh = (x @ p["kernel"] + p["bias"][0]).chunk(3, -1)
    hz, hr, hh = (h @ p["recurrent_kernel"] + p["bias"][1]).chunk(3, -1)
    z, r = sigmoid(xz + hz), sigmoid(xr + hr)
    return z * h + (1 - z) * tanh(xh + r * hh), None


def keras_gru_before(p: Parameters, x: Tensor, h: Tensor, c: None) -> tuple[Tensor, None]:
    xz, xr, xh = (x @ p["kernel"] + p["bias"]).chunk(3, -1)
    uz, ur, uh = p["recurrent_kernel"].chunk(3, -1)
    z, r = sigmoid(xz + h @ uz), sigmoid(xr + h @ ur)
    return z * h + (1 - z) * tanh(xh + (r * h) @ uh), None


def tf_contrib(p: Parameters, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    parts = zip((torch.cat([x, h], -1) @ p["kernel"]).chunk(4, -1), ("input", "transform", "forget", "output"))
    i, j, f, o = (ln(v, p[f"{scope}/gamma"], p[f"{scope}/beta"], 1e-12) for v, scope in parts)
    c = ln(lstm_c(i, f + 1.0, j, c), p["state/gamma"], p["state/beta"], 1e-12)
    return sigmoid(o) * tanh(c), c


def sketch_rnn(p: Parameters, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    a = (x @ p["W_xh"] + h @ p["W_hh"]).unflatten(-1, (4, H))
    a = p["ln_all/ln_gamma"] * ln(a, 1.0, 0.0, 1e-3).flatten(-2) + p["ln_all/ln_beta"]
    i, j, f, o = a.chunk(4, -1)
    c = lstm_c(i, f + 1.0, j, c)
    return sigmoid(o) * tanh(ln(c, p["ln_c/ln_gamma"], p["ln_c/ln_beta"], 1e-3)), c


def sonnet(p: Parameters, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    a = torch.cat([x, h], -1) @ p["w_gates"]
    if "layer_norm/gamma" in p:
        a = ln(a, p["layer_norm/gamma"], p["layer_norm/beta"], 1e-5)
    i, j, f, o = (a + p["b_gates"]).chunk(4, -1)
    c = lstm_c(i, f + 1.0, j, c)
    return sigmoid(o) * tanh(c), c


def lingvo_simple(p: Parameters, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    a = ln((torch.cat([x, h], -1) @ p["wm"]).unflatten(-1, (4, H)), 1.0, 0.0, 1e-8).flatten(-2)
    i_i, i_g, f_g, o_g = (a * p["ln_scale"] + p["b"]).chunk(4, -1)
    c = lstm_c(i_g, f_g + 0.5, i_i, c).clamp(-0.4, 0.4)  # tighter than Lingvo's 10, so that it has an effect
    return (sigmoid(o_g) * tanh(c)) @ p["w_proj"], c


def lingvo_lean(p: Parameters, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    parts = zip((torch.cat([x, h], -1) @ p["wm"]).chunk(4, -1), ("i_i", "i_g", "f_g", "o_g"))
    i_i, i_g, f_g, o_g = (ln(v, p[f"ln_scale_{gate}"] + 1.0, p[f"bias_{gate}"], 1e-8) for v, gate in parts)
    c = lstm_c(i_g, f_g, i_i, c)
    return sigmoid(o_g) * tanh(ln(c, p["ln_scale_c"] + 1.0, p["bias_c"], 1e-8)), c


def lngru(norm: str) -> Step:
    def step(p: Parameters, x: Tensor, h: Tensor, c: None) -> tuple[Tensor, None]:
        def n(v: Tensor, k: int) -> Tensor:
            return ln(v, p[f"{norm}s{k}"], p[f"{norm}b{k}"], 1e-5)

        r, u = sigmoid(n(h @ p["U"], 3) + n(x @ p["W"] + p["b"], 1)).chunk(2, -1)
        return u * h + (1 - u) * tanh(n(h @ p["Ux"], 4) * r + n(x @ p["Wx"] + p["bx"], 2)), None

    return step


def _norm(weight: str, shift: str, *names: str, size: int = H) -> dict[str, tuple[int, ...]]:
    """The shapes of a gain and a shift for each name."""
    return {f"{name}{part}": (size,) for name in names for part in (weight, shift)}


def _lngru_shapes(norm: str) -> dict[str, tuple[int, ...]]:
    sizes = {1: 2 * H, 2: H, 3: 2 * H, 4: H}
    norms = {f"{norm}{part}{k}": (size,) for k, size in sizes.items() for part in "sb"}
    return {"W": (I, 2 * H), "Wx": (I, H), "U": (H, 2 * H), "Ux": (H, H), "b": (2 * H,), "bx": (H,), **norms}


_TORCH_NORM = (".weight", ".bias")
_TF_NORM = ("/gamma", "/beta")
_FASTRNNS = {
    "weight_ih": (4 * H, I),
    "weight_hh": (4 * H, H),
    **_norm(*_TORCH_NORM, "layernorm_i", "layernorm_h", size=4 * H),
    **_norm(*_TORCH_NORM, "layernorm_c"),
}
_KERAS_LSTM = {"kernel": (I, 4 * H), "recurrent_kernel": (H, 4 * H), "bias": (4 * H,)}
_HASTE_TF_LSTM = {"kernel": (I + H, 4 * H), "bias": (4 * H,)}
_HASTE_TF_GRU = {"kernel": (I + H, 3 * H), "bias": (6 * H,)}
_HASTE_TF_INDRNN = {"kernel": (I, H), "recurrent_scale": (H,), "bias": (H,)}

FORMULAS = [
    Formula("haste_tf.LSTM", "lmnt-com/haste frameworks/tf/lstm.py", _HASTE_TF_LSTM, haste_lstm),
    Formula("haste_tf.GRU", "lmnt-com/haste frameworks/tf/gru.py", _HASTE_TF_GRU, haste_gru, has_c=False),
    Formula("haste_tf.IndRNN", "lmnt-com/haste frameworks/tf/indrnn.py", _HASTE_TF_INDRNN, haste_indrnn, has_c=False),
    Formula(
        "haste_tf.LayerNormLSTM",
        "lmnt-com/haste frameworks/tf/layer_norm_lstm.py",
        {**_HASTE_TF_LSTM, "gamma": (2, 4 * H), "gamma_h": (H,), "beta_h": (H,)},
        haste_layer_norm_lstm,
    ),
    Formula(
        "haste_tf.LayerNormGRU",
        "lmnt-com/haste frameworks/tf/layer_norm_gru.py",
        {**_HASTE_TF_GRU, "gamma": (2, 3 * H)},
        haste_gru,
        has_c=False,
    ),
    Formula(
        "haste_tf.LayerNormIndRNN",
        "lmnt-com/haste frameworks/tf/layer_norm_indrnn.py",
        {**_HASTE_TF_INDRNN, "gamma": (2, H)},
        haste_indrnn,
        has_c=False,
    ),
    Formula("nemo.LayerNormLSTMCell", "NVIDIA/NeMo nemo/collections/asr/parts/utils/rnn_utils.py", _FASTRNNS, fastrnns),
    Formula("distar.LayerNormLSTMCell", "opendilab/DI-star distar/agent/model/lstm.py", _FASTRNNS, fastrnns),
    Formula(
        "icefall.LayerNormLSTMCell",
        "k2-fsa/icefall egs/librispeech/ASR/transducer/rnn.py, bias=False and without a projection",
        {
            "weight_ih": (4 * H, I),
            "weight_hh": (4 * H, H),
            **_norm(*_TORCH_NORM, *(f"layernorm_{gate}" for gate in ("i", "f", "cx", "o", "cy"))),
        },
        icefall_lstm,
    ),
    Formula(
        "icefall.LayerNormGRUCell",
        "k2-fsa/icefall egs/librispeech/ASR/transducer/rnn.py",
        {
            "weight_ih": (3 * H, I),
            "weight_hh": (3 * H, H),
            "bias_ih": (3 * H,),
            "bias_hh": (3 * H,),
            **_norm(*_TORCH_NORM, "layernorm_r", "layernorm_i", "layernorm_n"),
        },
        icefall_gru,
        has_c=False,
    ),
    Formula(
        "torchaudio._CustomLSTM",
        "pytorch/audio torchaudio/models/rnnt.py",
        {
            "x2g.weight": (4 * H, I),
            "p2g.weight": (4 * H, H),
            **_norm(*_TORCH_NORM, "g_norm", size=4 * H),
            **_norm(*_TORCH_NORM, "c_norm"),
        },
        torchaudio,
        {"eps": 1e-3},
    ),
    Formula(
        "torchaudio._CustomLSTM",
        "pytorch/audio torchaudio/models/rnnt.py",
        {"x2g.weight": (4 * H, I), "x2g.bias": (4 * H,), "p2g.weight": (4 * H, H)},
        torchaudio_plain,
        {"layer_norm": False},
    ),
    Formula(
        "sheeprl.LayerNormGRUCell",
        "Eclectic-Sheep/sheeprl sheeprl/models/models.py, bias=False",
        {"linear.weight": (3 * H, H + I), **_norm(*_TORCH_NORM, "layer_norm", size=3 * H)},
        sheeprl,
        has_c=False,
    ),
    Formula(
        "dreamerv3_torch.GRUCell",
        "NM512/dreamerv3-torch networks.py",
        {"layers.GRU_linear.weight": (3 * H, I + H), **_norm(*_TORCH_NORM, "layers.GRU_norm", size=3 * H)},
        dreamerv3_torch,
        has_c=False,
    ),
    Formula(
        "dreamerv2.GRUCell",
        "danijar/dreamerv2 dreamerv2/common/nets.py",
        {
            "dense/kernel": (I + H, 3 * H),
            "dense/bias": (3 * H,),
            **_norm(*_TF_NORM, "layer_normalization", size=3 * H),
        },
        dreamerv2,
        has_c=False,
    ),
    Formula(
        "ding.LSTM",
        "opendilab/DI-engine ding/torch_utils/network/rnn.py",
        {
            "wx.0": (I, 4 * H),
            "wh.0": (H, 4 * H),
            "bias": (1, 4 * H),
            **_norm(*_TORCH_NORM, "norm.0", "norm.1", size=4 * H),
        },
        ding,
    ),
    Formula(
        "baselines.lnlstm",
        "openai/baselines baselines/a2c/utils.py",
        {
            "wx": (I, 4 * H),
            "wh": (H, 4 * H),
            **dict.fromkeys(("gx", "bx", "gh", "bh", "b"), (4 * H,)),
            "gc": (H,),
            "bc": (H,),
        },
        baselines,
    ),
    Formula("keras.LSTM", "keras-team/keras keras/src/layers/rnn/lstm.py", _KERAS_LSTM, keras_lstm),
    Formula(
        "keras.GRU",
        "keras-team/keras keras/src/layers/rnn/gru.py",
        {"kernel": (I, 3 * H), "recurrent_kernel": (H, 3 * H), "bias": (2, 3 * H)},
        keras_gru_after,
        has_c=False,
    ),
    Formula(
        "keras.GRU",
        "keras-team/keras keras/src/layers/rnn/gru.py",
        {"kernel": (I, 3 * H), "recurrent_kernel": (H, 3 * H), "bias": (3 * H,)},
        keras_gru_before,
        {"reset_after": False},
        has_c=False,
    ),
    Formula(
        "tfa.LayerNormLSTMCell",
        "tensorflow/addons tensorflow_addons/rnn/layer_norm_lstm_cell.py",
        {
            **_KERAS_LSTM,
            **_norm(*_TF_NORM, "kernel_norm", "recurrent_norm", size=4 * H),
            **_norm(*_TF_NORM, "state_norm"),
        },
        tfa,
    ),
    Formula(
        "tf_contrib.LayerNormBasicLSTMCell",
        "tensorflow 1.15 tensorflow/contrib/rnn/python/ops/rnn_cell.py",
        {"kernel": (I + H, 4 * H), **_norm(*_TF_NORM, "input", "transform", "forget", "output", "state")},
        tf_contrib,
    ),
    Formula(
        "sketch_rnn.LayerNormLSTMCell",
        "magenta/magenta magenta/models/sketch_rnn/rnn.py",
        {
            "W_xh": (I, 4 * H),
            "W_hh": (H, 4 * H),
            **_norm("/ln_gamma", "/ln_beta", "ln_all", size=4 * H),
            **_norm("/ln_gamma", "/ln_beta", "ln_c"),
        },
        sketch_rnn,
    ),
    Formula(
        "sonnet.LSTM",
        "deepmind/sonnet v1 sonnet/python/modules/gated_rnn.py",
        {"w_gates": (I + H, 4 * H), "b_gates": (4 * H,), **_norm(*_TF_NORM, "layer_norm", size=4 * H)},
        sonnet,
    ),
    Formula(
        "sonnet.LSTM",
        "deepmind/sonnet v1 sonnet/python/modules/gated_rnn.py",
        {"w_gates": (I + H, 4 * H), "b_gates": (4 * H,)},
        sonnet,
        {"layer_norm": False},
    ),
    Formula(
        "lingvo.LayerNormalizedLSTMCellSimple",
        "tensorflow/lingvo lingvo/core/rnn_cell.py",
        {"wm": (I + P, 4 * H), "b": (4 * H,), "ln_scale": (4 * H,), "w_proj": (H, P)},
        lingvo_simple,
        {"forget_gate_bias": 0.5, "cell_value_cap": 0.4},
        width=P,
    ),
    Formula(
        "lingvo.LayerNormalizedLSTMCellLean",
        "tensorflow/lingvo lingvo/core/rnn_cell.py",
        {
            "wm": (I + H, 4 * H),
            **{f"{part}_{gate}": (H,) for gate in ("i_i", "i_g", "f_g", "o_g", "c") for part in ("ln_scale", "bias")},
        },
        lingvo_lean,
    ),
    Formula("ryankiros.lngru", "ryankiros/layer-norm layers.py", _lngru_shapes(""), lngru(""), has_c=False),
    Formula("nematus.gru", "EdinburghNLP/nematus nematus/layers.py", _lngru_shapes("ln_"), lngru("ln_"), has_c=False),
]
