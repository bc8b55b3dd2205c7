"""Calls made by hand: whatever reaches a backend was checked at the door, by every way in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import festina
from festina import backends, dispatch, norms, ops
from festina.call import Call
from festina.checks import check_call
from festina.testing import Case

LSTM = Case(
    "lstm", norms.HASTE, T=4, B=3, I=3, H=5, features=("ragged", "resets", "zoneout", "zoneout_cell", "bidirectional")
)
FULL = Case("lstm", norms.HASTE, T=4, B=3, I=3, H=5)
GRU = Case("gru", norms.HASTE, T=4, B=3, I=3, H=5)


def build(case: Case) -> Call:
    return case.build()[0]


def sizes(*values: float, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def first(call: Call, parameter: Tensor) -> tuple[Tensor, ...]:
    return (parameter, *call.parameters[1:])


Changes = Callable[[Call], dict[str, Any]]

# Each row: a case, what is wrong in its call, the error, its text. batch_sizes of LSTM are [3, 3, 2, 1], 9 rows.
WRONG: dict[str, tuple[Case, Changes, type[Exception], str]] = {
    "int32 sizes": (
        LSTM,
        lambda c: {"batch_sizes": c.batch_sizes.int()},
        ValueError,
        r"batch_sizes must be int64 \[T\]",
    ),
    "float sizes": (
        LSTM,
        lambda c: {"batch_sizes": c.batch_sizes.float()},
        ValueError,
        r"batch_sizes must be int64 \[T\]",
    ),
    "2-D sizes": (LSTM, lambda c: {"batch_sizes": c.batch_sizes[None]}, ValueError, r"batch_sizes must be int64 \[T\]"),
    "meta sizes": (LSTM, lambda c: {"batch_sizes": c.batch_sizes.to("meta")}, ValueError, "on the CPU, got .* on meta"),
    "more sizes": (
        LSTM,
        lambda c: {"batch_sizes": sizes(3, 3, 3, 1)},
        ValueError,
        r"add up to the 9 rows of input, got \[",
    ),
    "fewer sizes": (LSTM, lambda c: {"batch_sizes": sizes(3, 3, 2)}, ValueError, "add up to the 9 rows of input"),
    "no sizes": (LSTM, lambda c: {"batch_sizes": sizes()}, ValueError, "add up to the 9 rows of input"),
    "rising sizes": (LSTM, lambda c: {"batch_sizes": sizes(1, 2, 3, 3)}, ValueError, "batch_sizes must not increase"),
    "negative sizes": (
        LSTM,
        lambda c: {"batch_sizes": sizes(3, 3, 3, 3, -3)},
        ValueError,
        "batch_sizes must not increase",
    ),
    "sizes beyond B": (LSTM, lambda c: {"batch_sizes": sizes(4, 3, 2)}, ValueError, "from at most B = 3 down"),
    "an empty step": (LSTM, lambda c: {"batch_sizes": sizes(3, 3, 3, 0)}, ValueError, "down to at least 1"),
    "large sizes": (LSTM, lambda c: {"batch_sizes": sizes(2**62, 2**62, 9)}, ValueError, "from at most B = 3 down"),
    "part of a step": (FULL, lambda c: {"input": c.input[:-1]}, ValueError, "whole steps of B = 3 rows"),
    "no rows": (FULL, lambda c: {"h_0": c.h_0[:, :0], "c_0": c.c_0[:, :0]}, ValueError, "whole steps of B = 0 rows"),
    "3-D input": (FULL, lambda c: {"input": c.input[None]}, ValueError, r"input must be \[N, I\]"),
    "2-D h_0": (FULL, lambda c: {"h_0": c.h_0[0]}, ValueError, r"h_0 \[D, B, P\]"),
    "B of h_0": (
        FULL,
        lambda c: {"h_0": c.h_0[:, :2]},
        ValueError,
        r"got input \[12, 3\], h_0 \[1, 2, 5\], c_0 \[1, 3, 5\]",
    ),
    "B of c_0": (FULL, lambda c: {"c_0": c.c_0[:, :2]}, ValueError, r"c_0 \[D, B, H\]"),
    "one state": (FULL, lambda c: {"c_0": None}, ValueError, "the lstm cell must have the states h, c, got 1"),
    "two states": (GRU, lambda c: {"c_0": c.h_0}, ValueError, "the gru cell must have the states h, got 2"),
    "no direction": (FULL, lambda c: {"h_0": c.h_0[:0], "c_0": c.c_0[:0]}, ValueError, "with D = 1 directions"),
    "two directions": (
        FULL,
        lambda c: {"h_0": c.h_0.repeat(2, 1, 1), "c_0": c.c_0.repeat(2, 1, 1)},
        ValueError,
        "D = 1",
    ),
    "width of h_0": (FULL, lambda c: {"h_0": c.h_0[..., :4]}, ValueError, r"weight_hh must be \[20, 4\]"),
    "input size": (
        FULL,
        lambda c: {"input": c.input[:, :2]},
        ValueError,
        r"weight_ih must be \[20, 2\] for input_size = 2",
    ),
    "weight": (
        FULL,
        lambda c: {"parameters": first(c, torch.zeros(60, 3))},
        ValueError,
        r"weight_ih must be \[20, 3\]",
    ),
    "parameters": (
        FULL,
        lambda c: {"parameters": c.parameters[1:]},
        ValueError,
        "parameters must be the 8 of weight_ih",
    ),
    "dtype": (FULL, lambda c: {"h_0": c.h_0.double()}, ValueError, "h_0 must be torch.float32 on cpu as the input"),
    "device": (FULL, lambda c: {"c_0": c.c_0.to("meta")}, ValueError, "c_0 must be torch.float32 on cpu as the input"),
    "export only": (
        FULL,
        lambda c: {"is_active": torch.ones(4, 3, dtype=torch.bool)},
        ValueError,
        "is_active must be None outside of an ONNX export",
    ),
    "short resets": (LSTM, lambda c: {"resets": c.resets[:, :-1]}, ValueError, r"resets must be \[D, N\] = \[2, 9\]"),
    "resets of D": (LSTM, lambda c: {"resets": c.resets[:1]}, ValueError, r"resets must be \[D, N\] = \[2, 9\]"),
    "byte resets": (
        LSTM,
        lambda c: {"resets": c.resets.byte()},
        TypeError,
        "resets must be a bool tensor, got torch.uint8",
    ),
    "float mask": (
        LSTM,
        lambda c: {"zoneout_mask": c.zoneout_mask.float()},
        TypeError,
        "zoneout_mask must be a bool tensor",
    ),
    "small mask": (
        LSTM,
        lambda c: {"zoneout_mask": c.zoneout_mask[:, :8]},
        ValueError,
        r"zoneout_mask must be \[2, 9, 5\]",
    ),
    "mask of c": (
        LSTM,
        lambda c: {"zoneout_cell_mask": c.zoneout_cell_mask[..., :4]},
        ValueError,
        r"zoneout_cell_mask must be \[2, 9, 5\]",
    ),
    "mask without c": (
        GRU,
        lambda c: {"zoneout_cell_mask": torch.zeros(1, 12, 5, dtype=torch.bool)},
        ValueError,
        "zoneout_cell_mask must be None: the gru cell has no c",
    ),
}


def operator(call: Call) -> None:
    torch.ops.festina.recurrence(*ops.arguments(call, ""))


def train_operator(call: Call) -> None:
    torch.ops.festina.recurrence_train(*ops.arguments(call, ""))


def transform(call: Call) -> None:
    torch.func.vmap(lambda _: dispatch.run(call).output)(torch.zeros(2))


def profiled(call: Call) -> None:
    with torch.profiler.profile():
        dispatch.run(call)


WAYS = [dispatch.run, operator, train_operator, transform, profiled]


class Watcher:
    """A backend that must not be reached."""

    name = "watcher"

    def can_run(self, case: object) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the backend was reached: {name}")


@pytest.mark.parametrize("is_recorded", [False, True], ids=["plain", "recorded"])
@pytest.mark.parametrize(
    ("name", "way"),
    # Of a tensor without values the dispatcher asks an operator for shapes alone.
    [
        (name, way)
        for name in WRONG
        for way in WAYS
        if name not in ("meta sizes", "device", "export only") or way in (dispatch.run, transform)
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_wrong_call_reaches_no_backend(
    name: str, way: Callable[[Call], None], is_recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, changes, error, text = WRONG[name]
    call = build(case)
    wrong = replace(call, **changes(call))
    wrong.input = wrong.input.detach().requires_grad_(is_recorded)
    monkeypatch.setitem(backends.registry(), "watcher", Watcher())
    with backends.use("watcher"), torch.set_grad_enabled(is_recorded), pytest.raises(error, match=text):
        way(wrong)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("case", [LSTM, FULL, GRU], ids=str)
def test_right_calls_pass_by_every_way(case: Case, backend: str) -> None:
    call = build(case)
    with backends.use(backend):
        for way in WAYS:
            way(call)


@pytest.mark.parametrize("way", [operator, train_operator, profiled])
@pytest.mark.parametrize(
    "name", ["h_0", "c_0", "weight_hh", "batch_sizes", "resets", "zoneout_mask", "zoneout_cell_mask"]
)
def test_one_tensor_without_numbers_is_refused(name: str, way: Callable[[Call], None]) -> None:
    """The dispatcher takes the whole call for one on meta, whose outputs would be what lay in memory."""
    call = build(LSTM)
    if name in call.layer.parameter_names:
        index = call.layer.parameter_names.index(name)
        call.parameters = tuple(p.to("meta") if i == index else p for i, p in enumerate(call.parameters))
    else:
        setattr(call, name, getattr(call, name).to("meta"))
    with pytest.raises(ValueError, match=f"{name}.* on meta"):
        way(call)


def test_batch_sizes_may_begin_below_b() -> None:
    call = build(FULL)
    call.batch_sizes, call.input = sizes(2, 1), call.input[:3]
    check_call(call, call.tensors())
    for backend in ("cpu", "eager"):
        with backends.use(backend):
            output, h_n, _ = dispatch.run(call)
        assert torch.equal(h_n[0, 2], call.h_0[0, 2])
        assert output.isfinite().all()


# Backward, called directly.


def backward_arguments(call: Call) -> list[Any]:
    output, state_n, saved = torch.ops.festina.recurrence_train(*ops.arguments(call, "cpu"))
    d_outputs = [torch.ones_like(output), *map(torch.ones_like, state_n), None][:3]
    return [*ops.arguments(call, "cpu"), output, saved, *d_outputs, [True] * len(call.tensors())]


WRONG_BACKWARD: dict[str, tuple[int, Callable[[Any], Any], str]] = {
    "output": (11, lambda output: output[:-1], r"output must be torch.float32 \[12, 5\] on cpu for this call"),
    "saved bytes": (12, lambda saved: [saved[0][:-64]], r"saved must be torch.uint8 \["),
    "nothing saved": (12, lambda saved: [], r"saved must hold 1 tensors for this call on cpu, got 0"),
    "d_output": (13, lambda d_output: d_output[:, :3], r"d_output must be torch.float32 \[12, 5\]"),
    "d_h_n": (14, lambda d_h_n: d_h_n.double(), r"d_h_n must be torch.float32 \[1, 3, 5\].*got torch.float64"),
    "d_c_n": (15, lambda d_c_n: d_c_n[0], r"d_c_n must be torch.float32 \[1, 3, 5\]"),
}


@pytest.mark.skipif(
    "cpu" not in backends.names() or backends.get("cpu").can_run(FULL.on("cpu")) is not None, reason="no core"
)
@pytest.mark.parametrize("name", WRONG_BACKWARD)
def test_backward_of_other_outputs_is_refused(name: str) -> None:
    index, change, text = WRONG_BACKWARD[name]
    args = backward_arguments(build(FULL))
    torch.ops.festina.recurrence_backward(*args)
    args[index] = change(args[index])
    with pytest.raises(ValueError, match=text):
        torch.ops.festina.recurrence_backward(*args)


# PackedSequence made by hand: torch.nn raises for each of these.


def packed(batch_sizes: Tensor, rows: int = 9, order: Tensor | None = None) -> PackedSequence:
    return PackedSequence(torch.randn(rows, 3), batch_sizes, order, order)


WRONG_PACKED: dict[str, tuple[PackedSequence, str]] = {
    "int32": (packed(sizes(3, 3, 2, 1).int()), r"batch_sizes must be int64 \[T\]"),
    "fewer rows": (packed(sizes(3, 3, 2, 1), rows=5), "batch_sizes must add up to the 5 rows of input"),
    "more rows": (packed(sizes(3, 3, 2, 1), rows=20), "batch_sizes must add up to the 20 rows of input"),
    "negative": (packed(sizes(3, 3, 4, -1)), "batch_sizes must not increase"),
    "rising": (packed(sizes(1, 2, 3, 3)), "batch_sizes must not increase"),
    "no steps": (packed(sizes(), rows=0), "a PackedSequence must have at least one step"),
    "short order": (packed(sizes(3, 3, 2, 1), order=torch.tensor([0, 1])), r"must be \[B\] = \[3\]"),
}


@pytest.mark.parametrize("is_recorded", [False, True], ids=["plain", "recorded"])
@pytest.mark.parametrize("make", [festina.LayerNormLSTM, festina.GRU])
@pytest.mark.parametrize("name", WRONG_PACKED)
def test_a_packed_sequence_is_not_trusted(name: str, make: type[nn.Module], is_recorded: bool) -> None:
    sequence, text = WRONG_PACKED[name]
    layer = make(3, 5)
    with torch.set_grad_enabled(is_recorded), pytest.raises(ValueError, match=text):
        layer(sequence)
    with torch.set_grad_enabled(is_recorded):
        layer(pack_sequence([torch.randn(4, 3), torch.randn(2, 3)]))


@pytest.mark.parametrize("is_autocast", [False, True], ids=["plain", "autocast"])
def test_a_parameter_that_is_none_is_named(is_autocast: bool) -> None:
    layer = festina.LayerNormLSTM(3, 5)
    layer.bias_ih_l0 = None
    with (
        torch.autocast("cpu", enabled=is_autocast),
        pytest.raises(TypeError, match="bias_ih must be a Tensor, got NoneType"),
    ):
        layer(torch.randn(4, 2, 3))


def test_shapes_go_back_through_meta_tensors_with_lengths() -> None:
    layer = festina.LayerNormLSTM(3, 5, device="meta")
    output, _ = layer(torch.randn(6, 2, 3, device="meta"), lengths=[6, 2])
    output.sum().backward()
    assert all(parameter.grad.is_meta for parameter in layer.parameters())


def test_mixed_dtypes_are_refused_without_numbers_too() -> None:
    layer = festina.LayerNormLSTM(3, 5, device="meta")
    layer.weight_hh_l0 = nn.Parameter(torch.empty(20, 5, dtype=torch.float64, device="meta"))
    with pytest.raises(ValueError, match=r"weight_hh must be torch.float32 on meta as the input, got torch.float64"):
        layer(torch.randn(6, 2, 3, device="meta"))
