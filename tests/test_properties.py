"""What the mathematics promises, over every cell and placement, with generated sizes, lengths, resets and cuts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from samples import VARIANTS, assert_same, has_c, listed, make, random_state
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from festina import NormPlan, functional

# The same examples at every run; shrinking is left out, since a failing case is small as it is.
some = settings(
    max_examples=2,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
seeds = st.integers(0, 2**16)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


class Drawn:
    """A layer in float64 with an input, an initial state, lengths and resets, all from one seed.

    Rates are set and the layer is in eval mode, so that Zoneout's expectation takes part.
    """

    def __init__(self, variant: str, seed: int, **options: Any) -> None:
        generator = torch.manual_seed(seed)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        self.T, self.B, self.I, H = draw(2, 7), draw(1, 5), draw(2, 4), draw(2, 9)
        options.setdefault("num_layers", draw(1, 2))
        options.setdefault("bidirectional", bool(draw(0, 1)))
        options.setdefault("bias", bool(draw(0, 3)))
        if has_c(variant):
            options.setdefault("zoneout_cell", 0.2 * draw(0, 1))
            options.setdefault("proj_size", draw(0, 1))
        options.setdefault("zoneout", 0.1 * draw(0, 1))
        self.layer = make(variant, self.I, H, dtype=torch.float64, **options).eval()
        self.D = self.layer.spec.directions
        self.rows = self.layer.num_layers * self.D
        self.x = torch.randn(self.T, self.B, self.I, dtype=torch.float64)
        self.hx = random_state(self.layer, self.rows, self.B)
        self.lengths = torch.randint(0, self.T + 1, (self.B,))
        self.resets = torch.rand(self.T, self.B) < 0.3
        self.cut = draw(1, self.T - 1)

    def extras(self) -> list[dict[str, Any]]:
        """Without, with one and with both of lengths and resets."""
        lengths, resets = {"lengths": self.lengths}, {"resets": self.resets}
        return [{}, lengths, resets, {**lengths, **resets}]


def map_state(state: Any, change: Any) -> Any:
    """The state with `change` done to each of its tensors."""
    return tuple(change(s) for s in state) if isinstance(state, tuple) else change(state)


def d_parameters(layer: Any, *args: Any, **options: Any) -> list[Tensor]:
    """Gradients of every parameter, of the squares of all that comes out."""
    output, state = layer(*args, **options)
    loss = sum((s * s).sum() for s in (output, *listed(state)))
    return list(torch.autograd.grad(loss, list(layer.parameters())))


@every_variant
@some
@given(seed=seeds)
def test_two_halves_make_a_whole(variant: str, seed: int) -> None:
    d = Drawn(variant, seed, bidirectional=False)
    for extra in d.extras():
        whole, last = d.layer(d.x, d.hx, **extra)

        def part(name: str, first: int, end: int, extra: dict[str, Any] = extra) -> dict[str, Any]:
            if name not in extra:
                return {}
            return {name: (d.lengths - first).clamp(0, end - first) if name == "lengths" else d.resets[first:end]}

        cuts = [(0, d.cut), (d.cut, d.T)]
        head, tail = ({**part("lengths", *cut), **part("resets", *cut)} for cut in cuts)
        one, middle = d.layer(d.x[: d.cut], d.hx, **head)
        two, end = d.layer(d.x[d.cut :], middle, **tail)
        assert_same(torch.cat([one, two]), whole)
        assert_same(end, last)


@every_variant
@some
@given(seed=seeds)
def test_the_order_of_rows_carries_through(variant: str, seed: int) -> None:
    d = Drawn(variant, seed)
    order = torch.randperm(d.B)
    for extra in d.extras():
        output, state = d.layer(d.x, d.hx, **extra)
        moved = {name: v[order] if name == "lengths" else v[:, order] for name, v in extra.items()}
        got, got_state = d.layer(d.x[:, order], map_state(d.hx, lambda s: s[:, order]), **moved)
        assert_same(got, output[:, order])
        assert_same(got_state, map_state(state, lambda s: s[:, order]))


@every_variant
@some
@given(seed=seeds, filling=st.sampled_from([float("nan"), float("inf"), 1e300]))
def test_steps_past_the_length_change_nothing(variant: str, seed: int, filling: float) -> None:
    """Neither results nor gradients, whatever stands there; the gradient there is 0."""
    d = Drawn(variant, seed)
    past = torch.arange(d.T).unsqueeze(1) >= d.lengths
    for resets in (None, d.resets):
        x = d.x.masked_fill(past.unsqueeze(2), filling).requires_grad_()
        output, state = d.layer(x, d.hx, lengths=d.lengths, resets=resets)
        assert_same((output, state), d.layer(d.x, d.hx, lengths=d.lengths, resets=resets), 0, 0)
        assert (output[past] == 0).all()
        sum((s * s).sum() for s in (output, *listed(state))).backward()
        assert x.grad is not None
        assert (x.grad[past] == 0).all()
        assert not x.grad.isnan().any()
        want = d_parameters(d.layer, d.x, d.hx, lengths=d.lengths, resets=resets)
        assert_same([p.grad for p in d.layer.parameters()], want)
        d.layer.zero_grad()


@every_variant
@some
@given(seed=seeds)
def test_lengths_are_a_packed_sequence_are_separate_rows(variant: str, seed: int) -> None:
    d = Drawn(variant, seed)
    lengths = d.lengths.clamp(min=1)  # a PackedSequence cannot hold an empty row
    for resets in (None, d.resets):
        output, state = d.layer(d.x, d.hx, lengths=lengths, resets=resets)
        longest = int(lengths.max())
        packed, packed_state = d.layer(
            pack_padded_sequence(d.x, lengths, enforce_sorted=False),
            d.hx,
            resets=None if resets is None else resets[:longest],
        )
        assert_same(pad_packed_sequence(packed, total_length=d.T)[0], output)
        assert_same(packed_state, state)
        for b, length in enumerate(lengths.tolist()):
            row, row_state = d.layer(
                d.x[:length, b],
                map_state(d.hx, lambda s: s[:, b]),  # noqa: B023  # used at once
                resets=None if resets is None else resets[:length, b],
            )
            assert_same(row, output[:length, b])
            assert_same(row_state, map_state(state, lambda s: s[:, b]))  # noqa: B023


@every_variant
@some
@given(seed=seeds, ragged=st.booleans())
def test_a_reset_makes_two_sequences_of_one(variant: str, seed: int, ragged: bool) -> None:
    """Of a row cut before step `cut`, each direction sees two sequences: the one it starts with has the initial state, the
    other one zeros; h_n is that of the last one it takes."""
    d = Drawn(variant, seed, num_layers=1)
    lengths = d.lengths if ragged else torch.full((d.B,), d.T)
    resets = torch.zeros(d.T, d.B, dtype=torch.bool)
    resets[d.cut] = True
    output, state = d.layer(d.x, d.hx, lengths=lengths if ragged else None, resets=resets)
    zeros = map_state(d.hx, lambda s: torch.zeros_like(s[:, 0]))
    for b, length in enumerate(lengths.tolist()):
        hx = map_state(d.hx, lambda s: s[:, b])  # noqa: B023
        if length <= d.cut:  # the cut lies past the row's end
            want, want_state = d.layer(d.x[:length, b], hx)
        else:
            starts = (hx, map_state(zeros, lambda s: s.clone()))
            first = map_state(hx, lambda s: s.clone())
            second = starts[1]
            if d.D == 2:  # the reverse direction starts in the second part
                for f, s, own in zip(listed(first), listed(second), listed(hx)):
                    f[1], s[1] = 0, own[1]
            one, one_state = d.layer(d.x[: d.cut, b], first)
            two, two_state = d.layer(d.x[d.cut : length, b], second)
            want = torch.cat([one, two])
            want_state = map_state(two_state, lambda s: s.clone())
            if d.D == 2:
                for w, o in zip(listed(want_state), listed(one_state)):
                    w[1] = o[1]
        assert_same(output[:length, b], want)
        assert_same(map_state(state, lambda s: s[:, b]), want_state)  # noqa: B023


@every_variant
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@some
@given(seed=seeds)
def test_zoneout_one_freezes(variant: str, training: bool, seed: int) -> None:
    rates = {"zoneout": 1.0, **({"zoneout_cell": 1.0} if has_c(variant) else {})}
    d = Drawn(variant, seed, **rates)
    d.layer.train(training)
    output, state = d.layer(d.x, d.hx)
    assert_same(state, d.hx)
    top = listed(d.hx)[0][-d.D :]
    assert_same(output, torch.cat(list(top), 1).expand(d.T, -1, -1))
    if has_c(variant):  # h alone frozen leaves c running, and the reverse
        d.layer.zoneout_cell = 0.0
        h_n, c_n = d.layer(d.x, d.hx)[1]
        assert_same(h_n, d.hx[0])
        assert not torch.allclose(c_n, d.hx[1])
        d.layer.zoneout, d.layer.zoneout_cell = 0.0, 1.0
        h_n, c_n = d.layer(d.x, d.hx)[1]
        assert_same(c_n, d.hx[1])
        assert not torch.allclose(h_n, d.hx[0])


@every_variant
@some
@given(seed=seeds)
def test_the_cell_step_by_step_is_the_layer(variant: str, seed: int) -> None:
    d = Drawn(variant, seed, num_layers=1, bidirectional=False)
    output, state = d.layer(d.x, d.hx, resets=d.resets)
    cell, here = d.layer.cell(), map_state(d.hx, lambda s: s[0])
    for t in range(d.T):
        here = cell(d.x[t], here, resets=d.resets[t])
        assert_same(listed(here)[0], output[t])
    assert_same(map_state(here, lambda s: s.unsqueeze(0)), state)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if "-" in v and v != "indrnn-relu"])
@some
@given(seed=seeds, factor=st.floats(0.1, 100.0))
def test_a_positive_factor_vanishes_under_its_norm(variant: str, seed: int, factor: float) -> None:
    """Eps apart, which is made too small to count. A joint norm has both products under it; a bias inside it scales too."""
    d = Drawn(variant, seed, num_layers=1)
    plan = d.layer.norm.with_eps(1e-30)
    layer = type(d.layer)(
        d.I,
        d.layer.hidden_size,
        bias=d.layer.bias,
        bidirectional=d.D == 2,
        proj_size=d.layer.proj_size,
        norm=plan,
        dtype=torch.float64,
    )
    weights = {name: value for name, value in d.layer.state_dict().items() if name != "_extra_state"}
    layer.load_state_dict(weights, strict=False)
    want = layer(d.x, d.hx)
    scaled = ["weight_ih", *(["weight_hh", "bias_inner"] if plan.placement == "joint" else [])]
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith(tuple(scaled)):
                parameter *= factor
    assert_same(layer(d.x, d.hx), want, 1e-7, 1e-8)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("gain"):
                parameter *= 2.0
    assert not torch.allclose(layer(d.x, d.hx)[0], want[0]), "the gain is what scales there"


@every_variant
@some
@given(seed=seeds)
def test_the_reverse_direction_is_the_forward_one_on_reversed_input(variant: str, seed: int) -> None:
    d = Drawn(variant, seed, num_layers=1, bidirectional=True)
    mirror = copy.deepcopy(d.layer)
    with torch.no_grad():
        for name, parameter in d.layer.named_parameters():
            partner = name.removesuffix("_reverse") if name.endswith("_reverse") else name + "_reverse"
            dict(mirror.named_parameters())[partner].copy_(parameter)
    P = d.layer.output_size
    for lengths in (None, d.lengths):
        ends = torch.full((d.B,), d.T) if lengths is None else lengths
        steps = torch.arange(d.T).unsqueeze(1)
        source = torch.where(steps < ends, ends - 1 - steps, steps)  # each row back to front, up to its own end

        def turn(padded: Tensor, source: Tensor = source) -> Tensor:
            return padded.gather(0, source.unsqueeze(2).expand_as(padded))

        output, state = d.layer(d.x, d.hx, lengths=lengths)
        got, got_state = mirror(turn(d.x), map_state(d.hx, lambda s: s.flip(0)), lengths=lengths)
        assert_same(turn(got).roll(P, 2), output)
        assert_same(map_state(got_state, lambda s: s.flip(0)), state)


@pytest.mark.parametrize("variant", ["lstm-haste", "gru-haste", "indrnn"])
@some
@given(seed=seeds)
def test_masks_given_are_masks_drawn(variant: str, seed: int) -> None:
    """functional.layer with explicit masks: True keeps the old value, False takes the new, step by step."""
    d = Drawn(
        variant,
        seed,
        num_layers=1,
        bidirectional=False,
        zoneout=0.0,
        proj_size=0,
        **({"zoneout_cell": 0.0} if has_c(variant) else {}),
    )
    H = d.layer.hidden_size
    masks = {"zoneout_mask": torch.rand(1, d.T, d.B, H) < 0.5}
    if has_c(variant):
        masks["zoneout_cell_mask"] = torch.rand(1, d.T, d.B, H) < 0.5
    parameters = dict(zip(d.layer.spec.parameter_names, d.layer.parameters()))
    plan: NormPlan = d.layer.norm
    output, state = functional.layer(d.layer.spec.cell.name, d.x, parameters, d.hx, norm=plan, **masks)
    assert isinstance(output, Tensor)
    cell, here = d.layer.cell(), map_state(d.hx, lambda s: s[0])
    for t in range(d.T):
        new = cell(d.x[t], here)
        kept = [torch.where(mask[0, t], was, now) for mask, was, now in zip(masks.values(), listed(here), listed(new))]
        here = tuple(kept) if len(kept) > 1 else kept[0]
        assert_same(output[t], kept[0])
    assert_same(map_state(here, lambda s: s.unsqueeze(0)), state)
