"""The layers: `LSTM`, `GRU`, `IndRNN` and their layer-normalised siblings, drop-in for `torch.nn`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from festina import cells, dispatch, dynamo, norms, spec
from festina.call import Outputs
from festina.checks import Lengths, MismatchError, as_count, as_flag, as_rate, check_flags, check_input
from festina.module import RecurrentBase, leaf
from festina.norms import NormPlan
from festina.sequences import InitialState, Packing, pack


class Recurrent(RecurrentBase, nn.RNNBase):
    """A stack of recurrent layers over time: the signature, shapes and state-dict keys of `torch.nn.LSTM` and `GRU`.

    Each is a subclass of `torch.nn.RNNBase`, `LSTM` and `LayerNormLSTM` of `torch.nn.LSTM`, `GRU` and `LayerNormGRU` of
    `torch.nn.GRU`. They have torch's attributes (`mode`, `all_weights`, `_flat_weights_names`, ...) and methods; but under a
    norm `_flat_weights` raises, since torch's kernels would compute another layer with them.

    Args:
        input_size: I, features of x.
        hidden_size: H, features of the state.
        num_layers: L, layers on top of each other.
        bias: False leaves out every bias and every norm's shift.
        batch_first: input, output and resets are `[B, T, ...]`; states are not.
        dropout: rate of dropout on the output of every layer but the last, in training.
        bidirectional: a second direction runs from each row's end; the outputs stand side by side.
        proj_size: P, project h to this many features (LSTM only; 0: no projection).
        device, dtype: of the parameters.
        norm: where the norms sit, a plan of `festina.norms`; None: the class's own.
        zoneout: rate at which h keeps its old value (Krueger et al. 2016): in training by a mask for each step and unit,
            otherwise by the expectation.
        zoneout_cell: the same for the LSTM's c.
        dropconnect: rate of dropout on `weight_hh` (Wan et al. 2013; Merity et al. 2017), one mask a forward call, in training.
        forget_bias: added to the initial shift of the LSTM's forget gate; None: the class's own.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or range, or the plan does not fit the cell.
    """

    cell_class: ClassVar[type[cells.Cell]]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        norm: NormPlan | None = None,
        zoneout: float = 0.0,
        zoneout_cell: float = 0.0,
        dropconnect: float = 0.0,
        forget_bias: float | None = None,
    ) -> None:
        num_layers = as_count("num_layers", num_layers)
        dropout = as_rate("dropout", dropout)
        bidirectional = as_flag("bidirectional", bidirectional)
        check_flags(
            bias=bias, batch_first=batch_first
        )  # torch.nn takes no number here: an argument in a wrong place shows
        if dropout and num_layers == 1:
            warnings.warn(f"dropout={dropout} acts between layers, and there is only one layer", stacklevel=2)
        plan = self.default_norm if norm is None else norm
        ends = ["", "_reverse"] if bidirectional else [""]
        super().__init__(
            input_size=input_size,
            hidden_size=hidden_size,
            proj_size=proj_size,
            spec=spec.LayerSpec(self.cell_spec, plan, bias, bool(proj_size), len(ends)),
            suffixes=[[f"_l{layer}{end}" for end in ends] for layer in range(num_layers)],
            zoneout=zoneout,
            zoneout_cell=zoneout_cell,
            dropconnect=dropconnect,
            forget_bias=forget_bias,
            device=device,
            dtype=dtype,
        )
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.dropout = dropout
        self.bidirectional = bidirectional
        self.reset_parameters()

    def _repr_defaults(self) -> dict[str, Any]:
        return {"num_layers": 1, "batch_first": False, "dropout": 0.0, "bidirectional": False}

    # What torch.nn.RNNBase keeps in lists of its own follows from the names here. Its other methods work on these.

    __jit_unused_properties__ = ["all_weights", "_all_weights", "_flat_weights_names", "_flat_weights"]  # noqa: RUF012
    __setattr__ = nn.Module.__setattr__  # type: ignore[assignment]
    _apply = nn.Module._apply
    _replicate_for_data_parallel = nn.Module._replicate_for_data_parallel

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def _init_flat_weights(self) -> None:
        """Does nothing: `_flat_weights` is never stale."""

    _update_flat_weights = _init_flat_weights

    @property
    def _all_weights(self) -> list[list[str]]:  # type: ignore[override]
        """The names of the parameters of every layer and direction."""
        size = len(self.spec.parameter_names)
        return [names[at : at + size] for names in self._names for at in range(0, len(names), size)]

    @property
    def all_weights(self) -> list[list[Any]]:
        """The parameters of every layer and direction, as in `torch.nn.LSTM`."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    @property
    def _flat_weights_names(self) -> list[str]:  # type: ignore[override]
        """The names of all parameters."""
        return [name for names in self._names for name in names]

    @property
    def _is_torchs(self) -> bool:
        """True if torch's own kernels compute the same with the parameters."""
        return self.norm.is_none and not self.spec.cell.diagonal

    def __dir__(self) -> list[str]:
        """What can be read: `torch.jit.trace` reads everything that is listed."""
        names: list[str] = super().__dir__()  # type: ignore[no-untyped-call]
        return names if self._is_torchs else [name for name in names if name != "_flat_weights"]

    @property  # type: ignore[override]
    def _flat_weights(self) -> tuple[Tensor, ...]:
        """All parameters, for who hands them to torch's own functions; a tuple, since a list would take what it cannot keep.

        Raises:
            RuntimeError: the layer is none of torch's.
        """
        if not self._is_torchs:
            raise RuntimeError(
                f"{type(self).__name__} has no _flat_weights: torch's own kernels would compute another layer with them; "
                "all_weights has the parameters"
            )
        return tuple(getattr(self, name) for name in self._flat_weights_names)

    @_flat_weights.setter
    def _flat_weights(self, weights: Any) -> None:
        for name, weight in zip(self._flat_weights_names, weights, strict=True):
            setattr(self, name, weight)

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """As in `torch.nn.LSTM`: raise unless input, `[T, B, I]` or with `batch_sizes` `[N, I]`, fits the layer.

        Raises:
            festina.checks.MismatchError: it does not.
        """
        dim = 3 if batch_sizes is None else 2
        if input.dim() != dim:
            raise MismatchError(f"input must be {dim}-D, got {input.dim()}-D {list(input.shape)}")
        check_input(input, self.input_size, self.layer_parameters()[0])

    def flatten_parameters(self) -> None:
        """Does nothing: parameters need not share one block of memory. It is here for code written for `torch.nn`."""

    def cell(self, layer: int = 0, *, reverse: bool = False) -> cells.Cell:
        """A cell on the parameters of one layer and direction: step by step it gives the layer's numbers.

        It is a separate module with the mode and rates that the layer has now: call `eval()` on it as well, and ask for a
        new one after the layer's parameters were replaced, as by `load_state_dict(assign=True)`.

        Raises:
            IndexError: there is no such layer or direction.
        """
        if not 0 <= layer < self.num_layers:
            raise IndexError(f"layer must lie in [0, {self.num_layers}), got {layer}")
        if reverse and not self.bidirectional:
            raise IndexError("reverse=True asks for the reverse direction, but the layer is not bidirectional")
        return self.cell_class.sharing(self, layer, reverse)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: InitialState | None = None,
        *,
        lengths: Lengths | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Any, Any]:
        """Run over a sequence.

        Args:
            input: `[T, B, I]`, `[B, T, I]` under batch_first, `[T, I]` for one row, a `PackedSequence`, or a NestedTensor
                `[B, j, I]` of the layout torch.jagged, whose rows may be empty.
            hx: h_0 `[L·D, B, P]`, for the LSTM (h_0, c_0 `[L·D, B, H]`); without B for one row; None: zeros.
            lengths: `[B]`, the steps of each row, in any order, 0 allowed, a list or a tensor on the CPU. Steps past a row's
                length are never read, and the output there is 0.
            resets: `[T, B]` bool (`[B, T]` under batch_first, `[T]` for one row, nested `[B, j]`): the row restarts at that
                step. The state is zeroed between steps t − 1 and t, in either direction, so that one call does the work of a
                call for each part.

        Returns:
            output `[T, B, D·P]`, or `[B, T, D·P]`, `[T, D·P]`, packed or nested, as the input was; and h_n `[L·D, B, P]`, for
            the LSTM (h_n, c_n `[L·D, B, H]`): each row's own last state, for the reverse direction the one at its first step.

        Raises:
            TypeError, ValueError: an argument is of a wrong type, shape, dtype, device or range.
        """
        if isinstance(input, Proxy):
            return leaf(self, input, hx, lengths=lengths, resets=resets)
        first = self.layer_parameters()

        def run(index: int, steps: Tensor, state: list[Tensor], packing: Packing) -> Outputs:
            parameters = self.layer_parameters(index) if index else first
            if index and self.dropout:
                steps = F.dropout(steps, self.dropout, self.training)
            return dispatch.run(self._packed_call(parameters, steps, state, packing))

        return run_stack(self, input, hx, lengths, resets, like=first[0], run=run)


def run_stack(
    module: Any,
    input: Tensor | PackedSequence,
    hx: InitialState | None,
    lengths: Lengths | None,
    resets: Tensor | None,
    *,
    like: Tensor,
    run: Callable[[int, Tensor, list[Tensor], Packing], Outputs],
) -> tuple[Any, Any]:
    """A stack of layers as `Recurrent.forward` runs it: from what a user gives to packed steps, from layer to layer, and back.

    Args:
        module: what has the sizes: a `RecurrentBase` with `num_layers` and `batch_first`.
        like: has the dtype and device that the input must have.
        run: carries out the call of layer `index` on packed steps and its initial state `[D, B, P]` and `[D, B, H]`.
    """
    D, L = module.spec.directions, module.num_layers
    steps, packing = pack(input, D, module.batch_first, lengths, resets)
    lead = ("num_layers * num_directions", L * D)
    check_input(steps, module.input_size, like)
    state = packing.initial_state(module.spec.cell, hx, lead=lead, widths=module.state_widths, steps=steps)
    finals: list[list[Tensor]] = []
    for index in range(L):
        own = state if L == 1 else [s[index * D : (index + 1) * D] for s in state]
        steps, *final = run(index, steps, own, packing)
        finals.append([last for last in final if last is not None])
    states = finals[0] if L == 1 else [torch.cat(of_all) for of_all in zip(*finals)]
    return packing.unpack(steps), packing.final_state(states)


class LSTM(Recurrent, nn.LSTM):
    """The LSTM of `torch.nn.LSTM`, gates i f g o, without a norm unless `norm` says otherwise.

        a   = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
        c_t = σ(f)·c_{t-1} + σ(i)·tanh(g)
        h_t = σ(o)·tanh(c_t),  or W_hr of that with proj_size

    Arguments, shapes, state-dict keys and initial values are those of `torch.nn.LSTM`; a state dict of either loads into
    the other. Beyond it: `lengths`, `resets`, Zoneout, DropConnect, norms.

    >>> output, (h_n, c_n) = LSTM(3, 5)(torch.zeros(7, 2, 3))
    >>> output.shape, c_n.shape
    (torch.Size([7, 2, 5]), torch.Size([1, 2, 5]))
    """

    mode = "LSTM"
    cell_spec = spec.LSTM
    cell_class = cells.LSTMCell


class LayerNormLSTM(LSTM):
    """The layer-normalised LSTM, by default haste's, which has the equations of Ba et al. 2016 (supplement, 20-22).

        a   = N(W_ih x_t; g_ih) + b_ih + N(W_hh h_{t-1}; g_hh) + b_hh     over all 4H values together
        c_t = σ(f)·c_{t-1} + σ(i)·tanh(g)
        h_t = σ(o)·tanh(N(c_t; g_c) + b_c)                                the carried c stays raw

    N is `festina.NormPlan`'s. It differs from PyTorch's custom_lstms and TensorFlow Addons, where the normalised c is the
    state: `norm=norms.FASTRNNS`, `norms.TFA`. forget_bias is 1.

    >>> layer = LayerNormLSTM(3, 5, batch_first=True)
    >>> output, _ = layer(torch.randn(2, 7, 3), lengths=[7, 4])
    >>> output[1, 4:].abs().max().item()
    0.0
    """

    cell_class = cells.LayerNormLSTMCell
    default_norm = norms.HASTE
    default_forget_bias = 1.0


class GRU(Recurrent, nn.GRU):
    """The GRU of `torch.nn.GRU`, gates r z n, without a norm unless `norm` says otherwise.

        r, z = σ(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
        n    = tanh(x_n + r·h_n),  x_n and h_n the third blocks of the two products
        h_t  = z·h_{t-1} + (1 − z)·n

    The reset gate acts after the product, as in cuDNN and in Keras' reset_after.

    >>> output, h_n = GRU(3, 5, bidirectional=True)(torch.zeros(7, 2, 3))
    >>> output.shape, h_n.shape
    (torch.Size([7, 2, 10]), torch.Size([2, 2, 5]))
    """

    mode = "GRU"
    cell_spec = spec.GRU
    cell_class = cells.GRUCell


class LayerNormGRU(GRU):
    """The layer-normalised GRU, by default haste's: N over all 3H values of each product, then `GRU`'s equations.

    Under a joint plan (`norms.DREAMER`) it is the GRU of DreamerV2 and V3, whose gates differ:
    `festina.reference.gru_joint_step` has them.

    >>> LayerNormGRU(3, 5)
    LayerNormGRU(3, 5, norm=norms.HASTE)
    """

    cell_class = cells.LayerNormGRUCell
    default_norm = norms.HASTE


class IndRNN(Recurrent):
    """The independently recurrent network (Li et al. 2018): h_t = φ(W_ih x_t + b_ih + u ⊙ h_{t-1}), u = `weight_hh_l0` [H].

    Args:
        nonlinearity: φ, `tanh` (haste) or `relu` (Li et al.). The other arguments are those of `Recurrent`.

    >>> output, h_n = IndRNN(3, 5, nonlinearity="relu")(torch.zeros(7, 2, 3))
    >>> output.shape
    torch.Size([7, 2, 5])
    """

    cell_class = cells.IndRNNCell

    def __init__(self, *args: Any, nonlinearity: str = "tanh", **kwargs: Any) -> None:
        self.cell_spec = cells.indrnn_spec(nonlinearity)
        self.nonlinearity = nonlinearity
        self.mode = f"INDRNN_{nonlinearity.upper()}"  # none of torch.nn's, so that its kernels refuse it
        super().__init__(*args, **kwargs)

    def _cell_options(self) -> dict[str, Any]:
        return {"nonlinearity": self.nonlinearity}

    def _repr_defaults(self) -> dict[str, Any]:
        return {"nonlinearity": "tanh", **super()._repr_defaults()}


class LayerNormIndRNN(IndRNN):
    """The layer-normalised IndRNN, haste's: h_t = φ(N(W_ih x_t; g_ih) + b_ih + u ⊙ h_{t-1}); there is no recurrent norm.

    >>> [name for name, _ in LayerNormIndRNN(3, 5).named_parameters()]
    ['weight_ih_l0', 'weight_hh_l0', 'bias_ih_l0', 'gain_ih_l0']
    """

    cell_class = cells.LayerNormIndRNNCell
    default_norm = norms.HASTE


dynamo.admit(Recurrent)
