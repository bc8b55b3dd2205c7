"""torchrl's modules for LSTM and GRU, with episodes that begin in the middle of a row; its IMPALA network; Dreamer's prior."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from ways import Adapt, Way, fit

import festina
from festina import norms

modules = pytest.importorskip("torchrl.modules")
tensordict = pytest.importorskip("tensordict")
impala = pytest.importorskip("torchrl.modules.models.recipes.impala")
dreamer = pytest.importorskip("torchrl.modules.models.model_based")

T, B, I, H = 8, 3, 4, 6


def episodes(states: list[str]) -> Any:
    """Rows of a rollout: what was seen, where an episode begins, the states, actions and advantages."""
    begins = torch.zeros(B, T, 1, dtype=torch.bool)
    begins[:, 0] = begins[0, 3] = begins[1, 6] = True
    found = {"seen": torch.randn(B, T, I), "is_init": begins, "target": torch.randn(B, T, 1)}
    return tensordict.TensorDict(found | {name: torch.zeros(B, T, 1, H) for name in states}, [B, T])


@pytest.mark.parametrize(
    ("module", "states"), [("LSTMModule", ["h", "c"]), ("GRUModule", ["h"])], ids=["LSTMModule", "GRUModule"]
)
def test_their_modules(way: Way, module: str, states: list[str]) -> None:
    def train(adapt: Adapt) -> list[float]:
        core = getattr(modules, module)(
            input_size=I,
            hidden_size=H,
            in_keys=["seen", *states],
            out_keys=["core", *(("next", name) for name in states)],
        )
        head = tensordict.nn.TensorDictModule(nn.Linear(H, 1), in_keys=["core"], out_keys=["value"])
        model = tensordict.nn.TensorDictSequential(core, head)
        adapt(model)
        rows = episodes(states)

        def loss() -> torch.Tensor:
            with modules.set_recurrent_mode(True):
                return (model(rows.clone())["value"] - rows["target"]).square().mean()

        losses = fit(model, loss)
        with torch.no_grad(), modules.set_recurrent_mode(True):
            whole = model(rows.clone())["value"]
        step = rows[:, 0]
        for t in range(T):  # one at a time, as an agent acts
            with torch.no_grad():
                step = model(step)
            torch.testing.assert_close(step["value"], whole[:, t], rtol=1e-4, atol=1e-5)
            if t + 1 < T:
                step = rows[:, t + 1].clone().update({name: step["next", name] for name in states})
        return losses

    way.check(train)


@pytest.mark.parametrize("norm", [None, norms.HASTE], ids=["plain", "normalised"])
def test_their_scan_computes_torchs_lstm_whatever_the_layer(norm: norms.NormPlan | None) -> None:
    """The backends `scan` and `triton` take the weights and not the layer: a limit that docs/compatibility.md names."""
    core = modules.LSTMModule(input_size=I, hidden_size=H, in_key="seen", out_key="core", recurrent_backend="scan")
    rows = episodes(["recurrent_state_h", "recurrent_state_c"])
    with torch.no_grad(), modules.set_recurrent_mode(True):
        plain = core(rows.clone())["core"]
        festina.replace(core, norm)
        torch.testing.assert_close(core(rows.clone())["core"], plain)
        core.recurrent_backend = "pad"
        assert torch.allclose(core(rows.clone())["core"], plain, atol=1e-5) == (norm is None)


def test_their_impala_network(way: Way) -> None:
    def train(adapt: Adapt) -> list[float]:
        model = impala.ImpalaNet(3, channels=(4,), out_features=8, use_lstm=True)
        seen, rewards = torch.rand(2, 5, 3, 12, 12), torch.randn(2, 5)
        done = torch.zeros(2, 5, dtype=torch.bool)
        model(seen, rewards, done)  # a lazy layer takes its size
        adapt(model)
        return fit(model, lambda: (model(seen, rewards, done)[0][2] - rewards[..., None]).square().mean())

    way.check(train)


def test_their_prior_of_dreamer(way: Way) -> None:
    def train(adapt: Adapt) -> list[float]:
        model = dreamer.RSSMPriorV3(
            action_shape=(2,), hidden_dim=8, rnn_hidden_dim=6, num_categoricals=3, num_classes=4, action_dim=2
        )
        adapt(model)
        actions, target = torch.randn(T, B, 2), torch.randn(B, 6)

        def loss() -> torch.Tensor:
            torch.manual_seed(1)  # states are drawn
            state, belief = torch.zeros(B, 12), torch.zeros(B, 6)
            for action in actions:
                _, state, belief = model(state, belief, action)
            return (belief - target).square().mean()

        return fit(model, loss)

    way.check(train, names=["torchrl.modules.models.model_based.GRUCell"])
