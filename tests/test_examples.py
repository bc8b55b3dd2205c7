"""The examples run and do what they claim."""

from __future__ import annotations

import doctest
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look it up here
    spec.loader.exec_module(module)
    return module


def test_streaming_hands_the_state_from_layer_to_cells_and_back() -> None:
    report = example("streaming").main(["--streams", "3", "--hidden", "9", "--steps", "15", "--frames", "12"])
    assert report.difference < 1e-5
    assert sum(report.losses[-3:]) / 3 < report.losses[0] - 0.02


def test_a_stream_forgets_the_rows_that_begin() -> None:
    streaming = example("streaming")
    torch.manual_seed(0)
    detector = streaming.Detector(9).eval()
    frames = torch.randn(5, 2, streaming.BANDS)
    used, fresh = streaming.Stream(detector, 2), streaming.Stream(detector, 2)
    used.step(frames[0])
    kept = used.step(frames[1], begins=torch.tensor([True, False]))
    new = fresh.step(frames[1])
    torch.testing.assert_close(kept[0], new[0])
    assert not torch.allclose(kept[1], new[1])


def test_the_policy_learns_to_remember() -> None:
    policy = example("recurrent_policy")
    right = policy.main(["--updates", "60", "--rows", "48", "--steps", "8", "--longest", "3", "--hidden", "16"])
    assert sum(right[:5]) / 5 < 0.65  # chance level is 0.5
    assert sum(right[-5:]) / 5 > 0.85


def test_what_the_actor_did_is_what_the_policy_learns_from() -> None:
    policy = example("recurrent_policy")
    torch.manual_seed(0)
    model = policy.Policy(8)
    actor = policy.Actor(model, policy.TMaze(5, longest=3))
    actor.act(4)
    rollout = actor.act(9)
    assert rollout.begins[1:].any()
    assert torch.equal(rollout.begins[1:], rollout.over[:-1])
    _, h_n = model.rnn(model.inputs(rollout.observations).tanh(), rollout.h_0, resets=rollout.begins)
    torch.testing.assert_close(h_n[0], actor.h)  # cell and layer agree across episodes
    assert doctest.testmod(policy).failed == 0


@pytest.mark.skipif(find_spec("lightning") is None, reason="lightning is not installed")
def test_lightning() -> None:
    losses = example("lightning_loop").main(["--epochs", "3", "--rows", "64"])
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
def test_accelerate() -> None:
    losses = example("accelerate_loop").main(["--epochs", "3", "--rows", "64"])
    assert losses[-1] < 0.9 * losses[0]
