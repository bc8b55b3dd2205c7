"""The cells: one step of a layer, with its parameters and its numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from festina import dispatch, norms, spec
from festina.call import Outputs
from festina.checks import as_flag, check_input, check_resets, check_row_axes, check_state
from festina.module import RecurrentBase, leaf
from festina.norms import NormPlan


class Cell(RecurrentBase, nn.RNNCellBase):
    """One step of a recurrent layer: the signature, shapes and state-dict keys of `torch.nn.LSTMCell` and `GRUCell`.

    Each is a subclass of `torch.nn.RNNCellBase`, and of `torch.nn.LSTMCell` or `GRUCell` where it is one of these.

    Args:
        input_size: I, features of x; 0 is allowed, as in `torch.nn`.
        hidden_size: H, features of the state; 0 is allowed.
        bias: False leaves out every bias and every norm's shift.
        device, dtype: of the parameters.
        proj_size, norm, zoneout, zoneout_cell, dropconnect, forget_bias: as in the layer. In training every step draws
            new masks of Zoneout and DropConnect.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or range, or the plan does not fit the cell.
    """

    least_size = 0

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        proj_size: int = 0,
        norm: NormPlan | None = None,
        zoneout: float = 0.0,
        zoneout_cell: float = 0.0,
        dropconnect: float = 0.0,
        forget_bias: float | None = None,
    ) -> None:
        plan = self.default_norm if norm is None else norm
        super().__init__(
            input_size=input_size,
            hidden_size=hidden_size,
            proj_size=proj_size,
            spec=spec.LayerSpec(self.cell_spec, plan, as_flag("bias", bias), bool(proj_size)),
            suffixes=[[""]],
            zoneout=zoneout,
            zoneout_cell=zoneout_cell,
            dropconnect=dropconnect,
            forget_bias=forget_bias,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()

    @classmethod
    def sharing(cls, layer: RecurrentBase, index: int, reverse: bool) -> Cell:
        """A cell on the parameters of one direction of layer `index`; users call `layer.cell`."""
        spec, D = layer.spec, layer.spec.directions
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the layer has warned already
            cell = cls(
                layer.output_size * D if index else layer.input_size,
                layer.hidden_size,
                layer.bias,
                device="meta",
                proj_size=layer.proj_size,
                norm=layer.norm,
                zoneout=layer.zoneout,
                zoneout_cell=layer.zoneout_cell,
                dropconnect=layer.dropconnect,
                **layer._cell_options(),
            )
        of_direction = layer.layer_parameters(index)[len(spec.parameter_names) * reverse :]
        for name, parameter in zip(spec.parameter_names, of_direction):
            if not isinstance(parameter, nn.Parameter):
                raise TypeError(
                    f"{name} of layer {index} is computed by a parametrization and cannot be shared; remove it "
                    "(torch.nn.utils.parametrize.remove_parametrizations), or call the layer itself with T = 1"
                )
            setattr(cell, name, parameter)
        return cell.train(layer.training)

    def forward(self, input: Tensor, hx: Any = None, *, resets: Tensor | None = None) -> Any:
        """Take one step.

        Args:
            input: `[B, I]`, or `[I]` for one row.
            hx: h `[B, P]`, for the LSTM (h, c `[B, H]`); without B for one row; None: zeros.
            resets: `[B]` bool, `[]` for one row: the row's state is zeroed before the step.

        Returns:
            The new h, for the LSTM (h, c), shaped as `hx`.

        Raises:
            TypeError, ValueError: an argument is of a wrong type, shape, dtype, device or range.
        """
        if not isinstance(input, Tensor):
            if isinstance(input, Proxy):
                return leaf(self, input, hx, resets=resets)
            raise TypeError(f"input must be a Tensor, got {type(input).__name__}")
        parameters = self.layer_parameters()
        if resets is None and not (self.training and (self.zoneout or self.zoneout_cell or self.dropconnect)):
            new = dispatch.step(
                layer=self.spec,
                parameters=parameters,
                input=input,
                state=hx if isinstance(hx, tuple) and len(hx) > 1 else (hx,),
                rates=(self.zoneout, self.zoneout_cell),
            )
            if new is not None:
                return tuple(new) if len(new) > 1 else new[0]

        def run(steps: Tensor, state: list[Tensor], resets: Tensor | None) -> Outputs:
            return dispatch.run(self._call(parameters, steps, state, resets=resets))

        return take_step(self, input, hx, resets, like=parameters[0], run=run)


def take_step(
    module: RecurrentBase,
    input: Tensor,
    hx: Any,
    resets: Tensor | None,
    *,
    like: Tensor,
    run: Callable[[Tensor, list[Tensor], Tensor | None], Outputs],
) -> Any:
    """One step as `Cell.forward` takes it: from what a user gives to packed steps, and from the outputs to the new state.

    Args:
        module: what has the sizes.
        like: has the dtype and device that the input must have.
        run: carries out a call on steps `[B, I]`, the state `[1, B, P]` and `[1, B, H]`, and resets `[1, B]`.
    """
    check_row_axes(input)
    is_batched = input.dim() == 2
    steps = input if is_batched else input.unsqueeze(0)
    check_input(steps, module.input_size, like)
    B, cell = steps.shape[0], module.spec.cell
    axes = {"B": B} if is_batched else {}
    if hx is None:
        state = [steps.new_zeros(1, B, width) for _, width in zip(cell.states, module.state_widths)]
    else:
        given = check_state(cell, hx, axes, module.state_widths, steps)
        state = [s.unsqueeze(0) if is_batched else s.view(1, 1, -1) for s in given]
    if resets is not None:
        check_resets(resets, tuple(axes.values()), "[B]" if is_batched else "[]", input.device)
        resets = resets.reshape(1, B)
    h, _, c_n = run(steps, state, resets)
    h = h if is_batched else h.squeeze(0)  # the output of one step is the new h
    return h if c_n is None else (h, c_n.squeeze(0) if is_batched else c_n.squeeze((0, 1)))


class LSTMCell(Cell, nn.LSTMCell):
    """One step of `festina.LSTM`; `torch.nn.LSTMCell` with norms, Zoneout, projection and resets.

    >>> h, c = LSTMCell(3, 5)(torch.zeros(2, 3))
    >>> h.shape
    torch.Size([2, 5])
    """

    cell_spec = spec.LSTM


class LayerNormLSTMCell(LSTMCell):
    """One step of `festina.LayerNormLSTM`.

    >>> cell = LayerNormLSTMCell(3, 5)
    >>> state = None
    >>> for x in torch.randn(4, 2, 3):
    ...     state = cell(x, state)
    """

    default_norm = norms.HASTE
    default_forget_bias = 1.0


class GRUCell(Cell, nn.GRUCell):
    """One step of `festina.GRU`; `torch.nn.GRUCell` with norms, Zoneout and resets.

    >>> GRUCell(3, 5)(torch.zeros(2, 3)).shape
    torch.Size([2, 5])
    """

    cell_spec = spec.GRU


class LayerNormGRUCell(GRUCell):
    """One step of `festina.LayerNormGRU`; `norm=norms.SHEEPRL` is sheeprl's cell of this name."""

    default_norm = norms.HASTE


class IndRNNCell(Cell):
    """One step of `festina.IndRNN`, `nonlinearity` `tanh` or `relu`."""

    def __init__(self, *args: Any, nonlinearity: str = "tanh", **kwargs: Any) -> None:
        self.cell_spec = indrnn_spec(nonlinearity)
        self.nonlinearity = nonlinearity
        super().__init__(*args, **kwargs)

    def _repr_defaults(self) -> dict[str, Any]:
        return {"nonlinearity": "tanh", **super()._repr_defaults()}


class LayerNormIndRNNCell(IndRNNCell):
    """One step of `festina.LayerNormIndRNN`."""

    default_norm = norms.HASTE


def indrnn_spec(nonlinearity: str) -> spec.CellSpec:
    """The IndRNN cell with this activation.

    Raises:
        ValueError: it is neither `tanh` nor `relu`.
    """
    specs = {"tanh": spec.INDRNN, "relu": spec.INDRNN_RELU}
    if nonlinearity not in specs:
        raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    return specs[nonlinearity]
