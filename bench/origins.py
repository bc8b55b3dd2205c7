"""Layers under rare plans against the loops of the projects that the plans come from, written out in PyTorch.

    python bench/origins.py                                  T = 100, B = 16, I = H = 256, one thread
    python bench/origins.py --steps 50 --batch 4 --hidden 512 --seconds 5

The contestants take turns in one process. A ratio is Festina's time divided by the loop's, the median of paired rounds: below
1, Festina is faster. Outputs are compared first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import festina
from festina import norms
from festina.cli.measure import Work, race

Parameters = dict[str, Tensor]
State = tuple[Tensor, ...]


def norm_gate(p: Parameters, gate: int, v: Tensor, eps: float) -> Tensor:
    """The norm of one gate's pre-activations, as a project's `nn.LayerNorm` for this gate computes it."""
    H = v.shape[-1]
    rows = slice(gate * H, (gate + 1) * H)
    return F.layer_norm(v, (H,), p["gain_joint_l0"][rows], p["bias_joint_l0"][rows], eps)


def icefall_gru(p: Parameters, x: Tensor, state: State) -> State:
    """k2-fsa/icefall egs/librispeech/ASR/transducer/rnn.py, LayerNormGRUCell."""
    (h,) = state
    x_r, x_z, x_n = F.linear(x, p["weight_ih_l0"], p["bias_inner_l0"]).chunk(3, 1)
    h_r, h_z, h_n = F.linear(h, p["weight_hh_l0"], p["bias_inner_hh_l0"]).chunk(3, 1)
    r = torch.sigmoid(norm_gate(p, 0, x_r + h_r, 1e-5))
    z = torch.sigmoid(norm_gate(p, 1, x_z + h_z, 1e-5))
    n = torch.tanh(norm_gate(p, 2, x_n + r * h_n, 1e-5))
    return (n + z * (h - n),)


def lingvo_lstm(p: Parameters, x: Tensor, state: State) -> State:
    """tensorflow/lingvo core/rnn_cell.py, LayerNormalizedLSTMCellSimple."""
    h, c = state
    parts = F.linear(torch.cat([x, h], 1), torch.cat([p["weight_ih_l0"], p["weight_hh_l0"]], 1)).chunk(4, 1)
    i, f, g, o = (norm_gate(p, gate, part, 1e-8) for gate, part in enumerate(parts))
    c = (torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)).clamp(-10, 10)
    return torch.sigmoid(o) * torch.tanh(c), c


def sockeye_gru(p: Parameters, x: Tensor, state: State) -> State:
    """awslabs/sockeye 1.18 sockeye/layers.py, LayerNormGRUCell."""
    (h,) = state
    G = p["weight_ih_l0"].shape[:1]
    x = F.layer_norm(F.linear(x, p["weight_ih_l0"], p["bias_inner_l0"]), G, p["gain_ih_l0"], p["bias_ih_l0"], 1e-6)
    of_h = F.layer_norm(
        F.linear(h, p["weight_hh_l0"], p["bias_inner_hh_l0"]), G, p["gain_hh_l0"], p["bias_hh_l0"], 1e-6
    )
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, 1), of_h.chunk(3, 1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return (n + z * (h - n),)


def keras_gru(p: Parameters, x: Tensor, state: State) -> State:
    """Keras GRU with reset_after=False."""
    (h,) = state
    H = h.shape[1]
    x_r, x_z, x_n = F.linear(x, p["weight_ih_l0"], p["bias_ih_l0"] + p["bias_hh_l0"]).chunk(3, 1)
    h_r, h_z = F.linear(h, p["weight_hh_l0"][: 2 * H]).chunk(2, 1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + F.linear(r * h, p["weight_hh_l0"][2 * H :]))
    return (n + z * (h - n),)


def lingvo_gru(p: Parameters, x: Tensor, state: State) -> State:
    """tensorflow/lingvo core/rnn_cell.py, GRUCell with apply_layer_norm; its update gate 1 − z is taken for z."""
    (h,) = state
    H = h.shape[1]
    of_r_z = F.linear(
        torch.cat([x, h], 1), torch.cat([p["weight_ih_l0"][: 2 * H], p["weight_hh_l0"][: 2 * H]], 1)
    ).chunk(2, 1)
    r, z = (torch.sigmoid(norm_gate(p, gate, part, 1e-8)) for gate, part in enumerate(of_r_z))
    of_n = F.linear(torch.cat([x, r * h], 1), torch.cat([p["weight_ih_l0"][2 * H :], p["weight_hh_l0"][2 * H :]], 1))
    n = torch.tanh(norm_gate(p, 2, of_n, 1e-8))
    return (n + z * (h - n),)


ORIGINS: dict[str, tuple[type[festina.LSTM] | type[festina.GRU], norms.NormPlan, Callable[..., State]]] = {
    "ICEFALL_GRU": (festina.GRU, norms.ICEFALL_GRU, icefall_gru),
    "LINGVO": (festina.LSTM, norms.LINGVO, lingvo_lstm),
    "SOCKEYE, GRU": (festina.GRU, norms.SOCKEYE, sockeye_gru),
    "RESET_BEFORE": (festina.GRU, norms.RESET_BEFORE, keras_gru),
    "LINGVO_GRU": (festina.GRU, norms.LINGVO_GRU, lingvo_gru),
}
"""A layer, its plan, and the step of the project that the plan comes from."""


def ratio(ours: Work, theirs: Work, seconds: float) -> float:
    """The median of paired rounds."""
    return race({"ours": ours, "theirs": theirs}, seconds).ratio["theirs"].median


def ratios(
    layer: festina.LSTM | festina.GRU, step: Callable[..., State], x: Tensor, seconds: float
) -> tuple[float, float]:
    """Forward, and forward with backward for all parameters."""
    p = dict(layer.named_parameters())

    def loop() -> Tensor:
        state: State = tuple(x.new_zeros(x.shape[1], layer.hidden_size) for _ in layer.spec.cell.states)
        outputs = []
        for row in x:
            state = step(p, row, state)
            outputs.append(state[0])
        return torch.stack(outputs)

    def ours() -> Tensor:
        return layer(x)[0]

    def trained(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(run().sum(), list(p.values()))[0]

    with torch.no_grad():
        torch.testing.assert_close(ours(), loop(), rtol=0, atol=1e-4)
        forward = ratio(ours, loop, seconds)
    return forward, ratio(trained(ours), trained(loop), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("steps", 100), ("batch", 16), ("input", 256), ("hidden", 256), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--seconds", type=float, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    x = torch.randn(args.steps, args.batch, args.input)
    print("plan            forward  forward + backward")
    for name, (make, plan, step) in ORIGINS.items():
        forward, both = ratios(make(args.input, args.hidden, norm=plan), step, x, args.seconds)
        print(f"{name:<16}{forward:7.2f}{both:20.2f}")


if __name__ == "__main__":
    main()
