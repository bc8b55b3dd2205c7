"""The public stateless API: `layer`, for users who hold parameters and masks themselves, and `recurrence`, which takes a
`festina.call.Call`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from festina import dispatch
from festina.call import Call
from festina.checks import Lengths, Parameters, as_rate, check_input, check_mask, check_parameters, check_zoneout_cell
from festina.norms import NONE, NormPlan
from festina.sequences import InitialState, pack

recurrence = dispatch.run


def layer(
    cell: str,
    input: Tensor | PackedSequence,
    parameters: Parameters | Sequence[Parameters],
    hx: InitialState | None = None,
    *,
    norm: NormPlan = NONE,
    batch_first: bool = False,
    lengths: Lengths | None = None,
    resets: Tensor | None = None,
    zoneout: float = 0.0,
    zoneout_cell: float = 0.0,
    zoneout_mask: Tensor | None = None,
    zoneout_cell_mask: Tensor | None = None,
) -> tuple[Tensor | PackedSequence, Tensor | tuple[Tensor, Tensor]]:
    """One recurrent layer over time. The equations are the steps of `festina.reference`.

    Args:
        cell: a name of `festina.spec.CELLS`: `lstm`, `gru`, `indrnn`, `indrnn_relu`.
        input: as in `festina.LSTM`: `[T, B, I]`, `[B, T, I]` under batch_first, `[T, I]` for one row, packed or nested.
        parameters: one direction's by name, or a sequence of two for a bidirectional layer. Which biases and whether
            `weight_hr` (a projection) are there says what the layer has.
        hx: h_0 `[D, B, P]`, for the LSTM (h_0, c_0 `[D, B, H]`); zeros if None. Without B for one row.
        norm: where the norms sit.
        lengths, resets: as in `festina.LSTM`.
        zoneout, zoneout_cell: rates of the expectation, in [0, 1]; used only without a mask.
        zoneout_mask, zoneout_cell_mask: bool, True keeps the old h (c): `[D, T, B, P]`, `[D, T, B, H]`, with B and T
            exchanged under batch_first.

    Returns:
        output in the form of the input, `[T, B, D·P]`; and h_n, for the LSTM (h_n, c_n), shaped as `hx`.

    Raises:
        TypeError, ValueError: an argument is of a wrong type, shape, dtype, device or range.

    >>> parameters = {"weight_ih": torch.ones(3, 2), "weight_hh": torch.ones(3)}
    >>> output, h_n = layer("indrnn", torch.zeros(5, 1, 2), parameters)
    >>> output.shape, h_n.shape
    (torch.Size([5, 1, 3]), torch.Size([1, 1, 3]))
    """
    per_direction = [parameters] if isinstance(parameters, Mapping) else list(parameters)
    spec, H, P = check_parameters(cell, norm, per_direction)
    D = spec.directions
    steps, packing = pack(input, D, batch_first, lengths, resets)
    weight_ih = per_direction[0]["weight_ih"]
    check_input(steps, weight_ih.shape[1], weight_ih)
    zoneout, zoneout_cell = as_rate("zoneout", zoneout), as_rate("zoneout_cell", zoneout_cell)
    check_zoneout_cell(spec.cell, zoneout_cell)
    state = packing.initial_state(spec.cell, hx, lead=("num_directions", D), widths=(P, H), steps=steps)

    def packed(name: str, mask: Tensor | None, width: int) -> Tensor | None:
        if mask is None:
            return None
        axes = (packing.B, packing.T) if batch_first else (packing.T, packing.B)
        check_mask(name, mask, (D, *axes, width), steps.device)
        return torch.stack([packing.pack(of_direction) for of_direction in mask])

    if "c" in spec.cell.states:  # else the door refuses it
        zoneout_cell_mask = packed("zoneout_cell_mask", zoneout_cell_mask, H)
    output, *states = dispatch.run(
        Call(
            layer=spec,
            input=steps,
            h_0=state[0],
            c_0=state[1] if len(state) > 1 else None,
            parameters=tuple(p[name] for p in per_direction for name in spec.parameter_names),
            batch_sizes=packing.batch_sizes,
            is_active=packing.is_active,
            resets=packing.resets,
            zoneout_mask=packed("zoneout_mask", zoneout_mask, P),
            zoneout_cell_mask=zoneout_cell_mask,
            zoneout=zoneout,
            zoneout_cell=zoneout_cell,
        )
    )
    return packing.unpack(output), packing.final_state([state for state in states if state is not None])
