"""Operators and the node of autograd's graph (`festina.ops`): opcheck, double backward, several graphs, saved tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from samples import assert_same, make, random_state

import festina
from festina import backends, ops, sequences
from festina.checks import MismatchError

T, B, I, H = 6, 4, 3, 5
F64: dict[str, Any] = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# Operators


def sample_calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of `recurrence` as layers make them in training; together they use every option."""

    def arguments(variant: str, extra: dict[str, Any], **options: Any) -> tuple[Any, ...]:
        layer = make(variant, I, H, **options)
        D = layer.spec.directions
        steps, packed = sequences.pack(torch.randn(T, B, I), D, **extra)
        state = random_state(layer, D, B)
        state = list(state) if isinstance(state, tuple) else [state]
        around = {"batch_sizes": packed.batch_sizes, "resets": packed.resets}
        call = layer._call(layer.layer_parameters(), steps, state, **around)
        return ops.arguments(call, backends.forced())

    lengths, resets = {"lengths": [3, 6, 0, 2]}, {"resets": torch.rand(T, B) < 0.3}
    return {
        "masks": arguments("gru-dreamer", {**lengths, **resets}, zoneout=0.5),
        "everything": arguments(
            "lstm-icefall", {**lengths, **resets}, bidirectional=True, proj_size=2, zoneout=0.5, zoneout_cell=0.5
        ),
        "indrnn": arguments("indrnn-haste", resets),
    }


@pytest.mark.parametrize("case", ["masks", "everything", "indrnn"])
def test_opcheck(case: str) -> None:
    """Every operator: schema, fake shapes, autograd, dispatch in compiled graphs."""
    *options, input, state, parameters = sample_calls()[case]
    call = (*options, input, state, [p.detach() for p in parameters])
    output, state_n, saved = torch.ops.festina.recurrence_train(*call)
    d_output, d_h_n, d_c_n = (*(torch.randn_like(t) for t in (output, *state_n)), None)[:3]
    wanted = [True] * (1 + len(state) + len(parameters))
    traced = ("test_aot_dispatch_dynamic",)
    for name, args, more in (
        ("recurrence", (*options, input.clone().requires_grad_(), state, list(parameters)), traced),
        ("recurrence_train", call, ()),  # it saves padding that is neither written nor read, so two calls differ
        ("recurrence_backward", (*call, output, saved, d_output, d_h_n, d_c_n, wanted), traced),
    ):
        utils = ("test_schema", "test_faketensor", *more)
        torch.library.opcheck(getattr(torch.ops.festina, name).default, args, test_utils=utils)


def test_opcheck_of_sort_rows() -> None:
    for lengths in ([3, 0, 5, 5], [0, 0], []):
        args = (torch.tensor(lengths, dtype=torch.int64), 5, True)
        torch.library.opcheck(torch.ops.festina.sort_rows.default, args)


# A step that a backend has prepared


@pytest.mark.parametrize("kind", [festina.LayerNormLSTMCell, festina.GRUCell])
def test_the_operator_takes_a_step_as_the_cell_does(kind: Any) -> None:
    """Its results share no memory; a wrong call is an error as ever, and a cell takes no states with an axis of directions."""
    cell, x = kind(I, H), torch.randn(B, I)
    states = [torch.randn(1, B, H) for _ in cell.spec.cell.states]
    options = ("", cell.spec.token, None, None, None, None, 0.0, 0.0)
    with torch.no_grad():
        for _ in range(3):
            output, state_n = torch.ops.festina.recurrence(*options, x, states, cell.layer_parameters())
            want = cell(x, tuple(s[0] for s in states) if len(states) > 1 else states[0][0])
            new = want if isinstance(want, tuple) else (want,)
            assert_same((output, *(s[0] for s in state_n)), (new[0], *new), 1e-6, 1e-6)
            assert len({t.untyped_storage().data_ptr() for t in (output, *state_n)}) == 1 + len(states)
            assert not any(t._is_view() for t in (output, *state_n))
        with pytest.raises(MismatchError, match="weight_ih must be"):
            torch.ops.festina.recurrence(*options, x[:, 1:], states, cell.layer_parameters())
        with pytest.raises(MismatchError, match="h_0 must be"):
            cell(x, tuple(states) if len(states) > 1 else states[0])
