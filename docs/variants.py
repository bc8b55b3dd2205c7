"""The tables of variants.md: `python docs/variants.py` writes them, `--check` exits with 1 unless they are up to date."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from festina import backends, convert, norms, reference
from festina.call import Call, Case
from festina.norms import NormPlan
from festina.output import replacing
from festina.spec import GRU, INDRNN, LSTM, CellSpec, LayerSpec

PAGE = Path(__file__).with_suffix(".md")


@dataclass(frozen=True)
class Variant:
    """A cell as one or more projects compute it.

    Args:
        cell: the cell.
        who: the projects.
        plan: its plan.
        formats: the formats that read its checkpoints.
        gates: the order of its gates, if no format has it.
        note: a remark.
    """

    cell: CellSpec
    who: str
    plan: NormPlan
    formats: tuple[str, ...] = ()
    gates: str = ""
    note: str = ""


N = norms
VARIANTS = [
    Variant(LSTM, "haste LayerNormLSTM", N.HASTE, ("haste.LayerNormLSTM", "haste_tf.LayerNormLSTM")),
    Variant(LSTM, "OpenAI baselines, stable-baselines lnlstm", N.HASTE, ("baselines.lnlstm",)),
    Variant(LSTM, "Ba et al. 2016, supplement (20)-(22)", N.BA2016, gates="fiog"),
    Variant(
        LSTM, "Ba et al. 2016, DRAW experiment; ryankiros/layer-norm LSTM_LN.lua except for its eps", N.BA2016_DRAW
    ),
    Variant(
        LSTM, "ryankiros/layer-norm lnlstm_layer", N.LNLSTM, gates="ifog", note="one bias, added inside and outside"
    ),
    Variant(LSTM, "Sockeye 1 LayerNormLSTMCell", N.SOCKEYE, gates="ifgo"),
    Variant(LSTM, "Marian --layer-normalization", N.MARIAN),
    Variant(LSTM, "DI-engine LSTM", N.DING, ("ding.LSTM",)),
    Variant(
        LSTM,
        "PyTorch custom_lstms.py, NeMo, DI-star",
        N.FASTRNNS,
        ("fastrnns.LayerNormLSTMCell", "nemo.LayerNormLSTMCell", "distar.LayerNormLSTMCell"),
    ),
    Variant(LSTM, "TensorFlow Addons LayerNormLSTMCell", N.TFA, ("tfa.LayerNormLSTMCell",)),
    Variant(LSTM, "RETURNN global_norm", N.RETURNN, gates="igfo"),
    Variant(LSTM, "RETURNN global_norm_joined", N.RETURNN_JOINED, gates="igfo"),
    Variant(LSTM, "torchaudio _CustomLSTM", N.TORCHAUDIO, ("torchaudio._CustomLSTM",), note="eps 1e-3 in its bundles"),
    Variant(LSTM, "Sonnet 1 LSTM", N.SONNET, ("sonnet.LSTM",)),
    Variant(LSTM, "Caffe2 LayerNormLSTMCell", N.CAFFE2, gates="ifog"),
    Variant(LSTM, "icefall LayerNormLSTMCell", N.ICEFALL, ("icefall.LayerNormLSTMCell",)),
    Variant(
        LSTM,
        "tf.contrib LayerNormBasicLSTMCell; RETURNN per_gate_norm",
        N.TF_CONTRIB,
        ("tf_contrib.LayerNormBasicLSTMCell",),
    ),
    Variant(LSTM, "Magenta sketch-rnn", N.SKETCH_RNN, ("sketch_rnn.LayerNormLSTMCell",)),
    Variant(LSTM, "Sockeye 1 LayerNormPerGateLSTMCell", N.SOCKEYE_PER_GATE, gates="ifgo"),
    Variant(LSTM, "Lingvo LayerNormalizedLSTMCellSimple", N.LINGVO, ("lingvo.LayerNormalizedLSTMCellSimple",)),
    Variant(LSTM, "Lingvo LayerNormalizedLSTMCellLean", N.LINGVO_LEAN, ("lingvo.LayerNormalizedLSTMCellLean",)),
    Variant(LSTM, "TensorFlow Lite, NNAPI", N.TFLITE, note="one tensor per gate"),
    Variant(GRU, "haste LayerNormGRU", N.HASTE, ("haste.LayerNormGRU", "haste_tf.LayerNormGRU")),
    Variant(GRU, "Marian --layer-normalization", N.MARIAN, gates="rzn", note="not its final cells, r·(h + b)"),
    Variant(GRU, "Sockeye 1 LayerNormGRUCell", N.SOCKEYE, gates="rzn"),
    Variant(GRU, "Ba et al. 2016, supplement", N.BA2016_GRU, gates="zrn"),
    Variant(GRU, "ryankiros/layer-norm lngru_layer, Nematus", N.LNGRU, ("ryankiros.lngru", "nematus.gru")),
    Variant(GRU, "Nematus, biases on the state's side", N.NEMATUS_STATE, gates="rzn"),
    Variant(GRU, "DreamerV3 (2023), NM512/dreamerv3-torch", N.DREAMER, ("dreamerv3_torch.GRUCell",)),
    Variant(GRU, "sheeprl LayerNormGRUCell", N.SHEEPRL, ("sheeprl.LayerNormGRUCell",)),
    Variant(GRU, "DreamerV2; sheeprl with a bias", N.DREAMER_V2, ("dreamerv2.GRUCell",)),
    Variant(GRU, "icefall LayerNormGRUCell", N.ICEFALL_GRU, ("icefall.LayerNormGRUCell",)),
    Variant(GRU, "Lingvo GRUCell", N.LINGVO_GRU, note="its update gate is 1 − z: gain and shift of z change sign"),
    Variant(GRU, "Keras with reset_after=False", N.RESET_BEFORE, ("keras.GRU",)),
    Variant(INDRNN, "haste LayerNormIndRNN", N.HASTE, ("haste.LayerNormIndRNN", "haste_tf.LayerNormIndRNN")),
]

OTHERS = {
    "pytorch-kaldi LSTM, GRU, liGRU": "h itself is normalised after each step, with the unbiased standard deviation",
    "DyNet VanillaLSTMBuilder": "eps is added to the standard deviation, and step 0 skips the norm of the recurrent product",
    "ryankiros/layer-norm LSTM_LN.lua": "eps is added to the standard deviation; otherwise `BA2016_DRAW`",
    "custom_lstms.py with decompose_layernorm=True": "a norm without eps: NaN if h is 0, so at step 0 of a zero state",
    "RETURNN with cell_norm_in_output=False (RNMT+)": "the normalised c is carried, but h is computed from the raw c",
    "RETURNN with hidden_norm": "h is normalised once more before it is fed back",
    "tf.contrib LayerNormLSTMCell with peepholes; Sonnet 1 with peepholes": "gates depend on c; no cell here has peepholes",
    "tf.contrib LayerNormBasicGRUCell (a pull request)": "one norm on the sum for the gates, two for the candidate",
    "Lingvo and TensorFlow Lite with coupled gates": "three gates, i = 1 − f: another cell",
    "Lingvo without output_nonlinearity": "h = σ(o)·c: another cell",
    "Sockeye 1 LayerNormPerGateGRUCell": "no checkpoint or test was found that shows where its reset gate acts",
    "DreamerV3 since 2024": "no norm on the gates, block-diagonal weights",
    "xLSTM sLSTM": "no norm inside the recurrence, exponential gates: another cell",
    "SpeechBrain SLiGRU, liGRU": "one gate and a relu candidate, no reset gate: another cell",
    "Kaldi norm-opgru": "an RMS norm on the projected h, batch norm on the output",
    "SRU": "the norm is on the layer's input, outside the recurrence: put a `LayerNorm` in front of an `SRU`",
}


def describe(plan: NormPlan, cell: CellSpec) -> str:
    """The placement of a plan in words."""
    plan = cell.fit(plan)
    placement = {"none": "", "separate": "x | h", "joint": "x + h"}[plan.placement]
    if cell.diagonal:
        placement = "x"
    groups = {"all": "all gates", "gate": "each gate", "gates|candidate": "gates, candidate"}[plan.groups]
    parts = [f"{placement}, {groups}" if placement and len(cell.gates) > 1 else placement]
    parts.append({"none": "", "readout": "c in h", "carried": "c carried"}[plan.cell])
    inside = [side for side, there in (("x", plan.inner_bias), ("h", plan.inner_bias_hh)) if there]
    parts.append(f"bias inside ({', '.join(inside)})" if inside else "")
    parts.append({"normed": "", "product": "r before the norm", "state": "r before the product"}[plan.reset])
    parts.append(f"c clipped at ±{plan.clip:g}" if plan.clip else "")
    return "; ".join(part for part in parts if part)


def run(cell: CellSpec, plan: NormPlan) -> Tensor:
    """The output of a cell under a plan, with the same weights for all plans."""
    layer = LayerSpec(cell, plan)
    T, B, I, H = 50, 8, 16, 32
    draw = torch.Generator().manual_seed(0)
    x, h_0 = torch.randn(T * B, I, generator=draw, dtype=torch.float64), torch.zeros(1, B, H, dtype=torch.float64)
    shapes = layer.parameter_shapes(I, H, H)
    p = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for name in ("weight_ih", "weight_hh"):
        p[name] = torch.randn(shapes[name], generator=draw, dtype=torch.float64) / H**0.5
    bias = 0.5 * torch.randn(len(cell.gates) * H, generator=draw, dtype=torch.float64)
    for name in p:
        if name.startswith("gain"):
            p[name] += 1
        elif name in ("bias_ih", "bias_joint", "bias_inner"):
            p[name] = bias
    c_0 = h_0 if len(cell.states) > 1 else None
    return reference.run(
        Call(layer=layer, input=x, h_0=h_0, c_0=c_0, parameters=tuple(p[name] for name in layer.parameter_names))
    )[0]


@cache
def distance(cell: CellSpec, plan: NormPlan) -> str:
    """The largest difference of any output from HASTE's, to two digits."""
    worst = float((run(cell, plan) - run(cell, norms.HASTE)).abs().max())
    return f"{worst:.2g}" if worst else "0"


def kernels(cell: CellSpec, plan: NormPlan) -> str:
    """The backends with kernels for the plan: on each device they refuse it only if they refuse the plain cell."""

    def refusals(layer: LayerSpec, name: str) -> list[str | None]:
        return [
            backends.get(name).can_run(Case(layer, torch.float32, torch.device(device))) for device in ("cpu", "cuda")
        ]

    plain, layer = LayerSpec(cell), LayerSpec(cell, plan)
    return " ".join(name for name in backends.names() if refusals(layer, name) == refusals(plain, name))


def plans_table() -> Iterator[str]:
    yield "| Cell | Used by | Norm | eps | Gates | Plan | Format | Off HASTE | Backends |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for v in VARIANTS:
        gates = convert.table(v.formats[0]).gates if v.formats else v.gates
        columns = [
            v.cell.name.upper().replace("INDRNN", "IndRNN"),
            f"{v.who}; {v.note}" if v.note else v.who,
            describe(v.plan, v.cell),
            f"{v.plan.eps:g}" if not v.plan.is_none and v.plan != norms.RESET_BEFORE else "",
            " ".join(gates) if len(gates) > 1 else "",
            f"`{v.plan}`",
            ", ".join(f"`{name}`" for name in v.formats),
            distance(v.cell, v.plan),
            kernels(v.cell, v.plan),
        ]
        yield "| " + " | ".join(text.replace("|", "\\|") for text in columns) + " |"


def others_table() -> Iterator[str]:
    yield "| Variant | Why not |"
    yield "|---|---|"
    yield from (f"| {who} | {why} |" for who, why in OTHERS.items())


def page() -> str:
    """The page with its tables up to date."""
    text = PAGE.read_text("utf-8")
    for name, table in (("plans", plans_table()), ("others", others_table())):
        mark = f"<!-- made by docs/variants.py: {name} -->\n"
        made = mark + "\n" + "\n".join(table) + "\n\n<!-- end -->"
        text = re.sub(re.escape(mark) + ".*?<!-- end -->", lambda _, made=made: made, text, flags=re.DOTALL)
    return text


def main() -> int:
    made = page()
    if "--check" in sys.argv:
        return 0 if made == PAGE.read_text("utf-8") else 1
    with replacing(PAGE) as unfinished:
        unfinished.write_text(made, "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
