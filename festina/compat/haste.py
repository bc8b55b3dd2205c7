"""haste_pytorch's six classes: `import festina.compat.haste as haste` is the whole migration.

Signatures, parameter names and shapes, initial values and the order of random numbers are haste's. Unlike haste, these
classes run on every device and backend, backward works in eval mode, and so does double backward.

`LSTM` and `GRU` here are haste's, not `torch.nn`'s: `dropout` is DropConnect on the recurrent kernel, `zoneout` acts on h
alone, `lengths` leaves the output unmasked. `convert.load("haste.LSTM", state_dict)` gives a layer of `festina` itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from festina import backends, functional, reference
from festina.checks import Lengths, check_forget_bias, check_lengths, is_rate
from festina.convert import haste as tables
from festina.convert.engine import Table, assemble, disassemble, specialise
from festina.spec import LayerSpec

__all__ = ["GRU", "LSTM", "IndRNN", "LayerNormGRU", "LayerNormIndRNN", "LayerNormLSTM"]

State = Tensor | tuple[Tensor, Tensor]


class _Layer(nn.Module):
    """Base of the six classes: parameters in the layout of the format's `table`, and the forward pass.

    Raises:
        ValueError: a rate is not in [0, 1], or the forget bias not finite.
    """

    table: ClassVar[Table]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        batch_first: bool,
        zoneout: float,
        return_state_sequence: bool,
        dropout: float = 0.0,
        forget_bias: float = 0.0,
    ) -> None:
        super().__init__()
        for name, rate in (("dropout", dropout), ("zoneout", zoneout)):
            if not is_rate(rate):
                raise ValueError(f"{type(self).__name__}: {name} must be in [0.0, 1.0]")
        check_forget_bias(self.table.cell, forget_bias)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.batch_first = batch_first
        self.zoneout = zoneout
        self.return_state_sequence = return_state_sequence
        self.dropout = dropout
        self.forget_bias = forget_bias
        self._layouts = self.table.layouts(lambda key: True)
        assert self.table.plan is not None
        self._spec = specialise(self.table.cell, self.table.plan, self._layouts.values(), directions=1)
        self._shapes = self._spec.parameter_shapes(input_size, hidden_size, hidden_size)
        zeros = {name: torch.zeros(shape) for name, shape in self._shapes.items()}
        for name, value in self._foreign(zeros).items():
            self.register_parameter(name, nn.Parameter(value))
        self.reset_parameters()

    def _foreign(self, ours: dict[str, Tensor]) -> dict[str, Tensor]:
        """haste's tensors from Festina's."""
        parts = disassemble(self._spec, self.table.gates, self._layouts, ours, self._shapes)
        return {name: part.clone(memory_format=torch.contiguous_format) for name, part in parts.items()}

    def _ours(self, **changed: Tensor) -> dict[str, Tensor]:
        """Festina's parameters from haste's, some of them `changed`. Autograd works through it."""
        tensors = [(part, changed.get(name, getattr(self, name))) for name, part in self._layouts.items()]
        return assemble(self._spec, self.table.gates, tensors, self._shapes)

    def reset_parameters(self) -> None:
        """Initialise kernels gate by gate, Xavier uniform and orthogonal; `recurrent_scale` uniform in ±0.5; gains 1; biases
        0, except `forget_bias` for the forget gate.
        """
        initial: dict[str, Callable[[Tensor], Tensor]] = {
            "kernel": nn.init.xavier_uniform_,
            "recurrent_kernel": nn.init.orthogonal_,
            "recurrent_scale": lambda scale: nn.init.uniform_(scale, -0.5, 0.5),
        }
        gates = self.table.gates
        with torch.no_grad():
            for at, gate in enumerate(gates):  # haste's order: gate by gate, the kernel first
                for name, parameter in self.named_parameters():
                    if name in initial:
                        initial[name](parameter.chunk(len(gates), -1)[at])
                    elif name == "bias":
                        parameter.chunk(len(gates))[at].fill_(self.forget_bias if gate == "f" else 0.0)
            for name, parameter in self.named_parameters():
                if name.startswith("gamma"):
                    nn.init.ones_(parameter)
                elif name in ("recurrent_bias", "beta_h"):
                    nn.init.zeros_(parameter)

    def forward(
        self, input: Tensor, state: State | None = None, lengths: Lengths | None = None
    ) -> tuple[Tensor, State]:
        """Run over a sequence.

        Args:
            input: `[T, B, I]`, or `[B, T, I]` under batch_first.
            state: h_0 `[1, B, H]`, for the LSTMs (h_0, c_0); None: zeros.
            lengths: `[B]`, the length of each row. The returned state is each row's state at its length; the output is not
                masked.

        Returns:
            output `[T, B, H]`, or `[B, T, H]`, and h_n `[1, B, H]`, for the LSTMs (h_n, c_n). Under return_state_sequence the
            state after every step, `[1, T, B, H]` or `[1, B, T, H]`, regardless of lengths.

        Raises:
            ValueError: the state has a wrong structure or shape.
        """
        steps = self._permute(input)
        B = steps.shape[1]
        shape = [1, B, self.hidden_size]
        wanted = (shape, shape) if len(self._spec.cell.states) > 1 else shape
        start = _listed(self._get_state(steps, state, wanted))
        zoneout_mask = self._get_zoneout_mask(steps) if self.training else steps.new_empty(0, 0, 0)

        if self.return_state_sequence:
            states = _listed(self._impl(steps, _as_given([s[0] for s in start]), zoneout_mask))
            output = states[0][1:]
            return self._permute(output), _as_given([self._permute(s[1:]).unsqueeze(0) for s in states])
        run, mask = self._run(steps, zoneout_mask)
        if lengths is None:
            output, states = run(steps, start, mask)
        else:
            output, states = run.with_states_at(
                check_lengths(torch.as_tensor(lengths, device="cpu"), B), steps, start, mask
            )
        return self._permute(output), _as_given(states)

    def _run(self, steps: Tensor, zoneout_mask: Tensor) -> tuple[_Run, Tensor | None]:
        """What runs the layer, with one mask of DropConnect, and Festina's mask of Zoneout from haste's, its inverse."""
        changed = {}
        if self.dropout:
            changed["recurrent_kernel"] = F.dropout(self.get_parameter("recurrent_kernel"), self.dropout, self.training)
        mask = zoneout_mask == 0 if self.zoneout and self.training else None
        is_script = steps.is_cuda and not self._is_cuda()
        return _Run(self._spec, self._ours(**changed), self.zoneout, is_script), mask

    # The inner methods of haste's layers that haste's validation and code derived from the layers call or replace.

    def _is_cuda(self) -> bool:
        """True if the parameters are on a CUDA device. haste's validation replaces it by False there to get haste's other path,
        in TorchScript; here that is the backend `eager`.
        """
        on_cuda = [parameter.is_cuda for parameter in self.parameters()]
        if any(on_cuda) and not all(on_cuda):
            raise ValueError("RNN tensors should all be CUDA tensors or none should be CUDA tensors")
        return any(on_cuda)

    def _permute(self, x: Tensor) -> Tensor:
        """Exchange T and B under batch_first."""
        return x.transpose(0, 1) if self.batch_first else x

    def _get_state(self, input: Tensor, state: State | None, state_shape: list[int] | tuple[list[int], ...]) -> State:
        """The state, which must have this shape, or zeros.

        Raises:
            ValueError: the state has a wrong structure or shape.
        """
        if state is None:
            shapes = state_shape if isinstance(state_shape, tuple) else (state_shape,)
            return _as_given([input.new_zeros(shape) for shape in shapes])
        return _as_given(_validated(state, state_shape))

    def _get_zoneout_mask(self, input: Tensor) -> Tensor:
        """`[T, B, H]`, 0 where h keeps its old value at rate `zoneout`, 1 elsewhere; empty without Zoneout."""
        if not self.zoneout:
            return input.new_empty(0, 0, 0)
        return input.new_empty(*input.shape[:2], self.hidden_size).bernoulli_(1.0 - self.zoneout)

    def _impl(self, input: Tensor, state: State, zoneout_mask: Tensor) -> State:
        """From input `[T, B, I]`, the states `[B, H]` and `_get_zoneout_mask`'s mask, which only training reads, to the states
        before and after every step: h `[T + 1, B, H]`, for the LSTMs (h, c).
        """
        run, mask = self._run(input, zoneout_mask)
        return _as_given(run.with_every_state(input, [s.unsqueeze(0) for s in _listed(state)], mask))

    def extra_repr(self) -> str:
        options = {"batch_first": False, "dropout": 0.0, "zoneout": 0.0, "return_state_sequence": False}
        shown = [f"{name}={value}" for name in options if (value := getattr(self, name)) != options[name]]
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *shown])


class _Run:
    """One forward call: runs the layer, with its parameters and rate, over any part of the steps."""

    def __init__(self, spec: LayerSpec, parameters: dict[str, Tensor], zoneout: float, is_script: bool) -> None:
        self.spec, self.parameters, self.zoneout, self.is_script = spec, parameters, zoneout, is_script

    def __call__(
        self, steps: Tensor, start: list[Tensor], mask: Tensor | None, lengths: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Output `[T, B, H]` and final states `[1, B, H]`."""
        with backends.use("eager") if self.is_script else nullcontext():
            output, last = functional.layer(
                self.spec.cell.name,
                steps,
                self.parameters,
                _as_given(start),
                norm=self.spec.plan,
                lengths=lengths,
                zoneout=self.zoneout,
                zoneout_mask=None if mask is None else mask.unsqueeze(0),
            )
        return cast(Tensor, output), _listed(last)

    def with_every_state(self, steps: Tensor, start: list[Tensor], mask: Tensor | None) -> list[Tensor]:
        """The states before and after every step `[T + 1, B, H]`.

        h is the output. Once it is known, the gates of all steps follow from it at once, and then c, which haste neither
        normalises nor subjects to Zoneout.
        """
        output, _ = self(steps, start, mask)
        h = torch.cat([start[0], output])
        T, B = steps.shape[:2]
        if len(start) == 1 or not T * B:
            return [h, *(c.expand(T + 1, -1, -1) for c in start[1:])]
        before = h[:-1].flatten(0, 1)
        x = reference.input_product(self.spec, steps.flatten(0, 1), self.parameters)
        product = reference.recurrent_product(self.spec, before, self.parameters)
        pre = reference.pre_activations(self.spec, x, product, self.parameters)
        kept, added = (gate.view(T, B, -1).split(1) for gate in reference.lstm_gates(pre))
        c = [reference.wide(start[1])]
        for f, u in zip(kept, added):
            c.append(torch.addcmul(u, f, c[-1]))
        return [h, torch.cat(c).to(h.dtype)]

    def with_states_at(
        self, lengths: Tensor, steps: Tensor, start: list[Tensor], mask: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Output of all steps, and the states at each row's length.

        The first call runs every row to its length. Then each row is rotated so that the rest of it begins at step 0, and a
        second call runs the rests from the states of the first.
        """
        T = len(steps)
        t = torch.arange(T, device=lengths.device).unsqueeze(1)

        def rotated(tensor: Tensor, by: Tensor) -> Tensor:
            at = ((t + by) % max(T, 1)).unsqueeze(2).expand(-1, -1, tensor.shape[2]).to(tensor.device)
            return tensor.gather(0, at)

        head, states = self(steps, start, mask, lengths)
        tail, _ = self(rotated(steps, lengths), states, None if mask is None else rotated(mask, lengths), T - lengths)
        return head + rotated(tail, -lengths), states


def _listed(state: State) -> list[Tensor]:
    return [state] if isinstance(state, Tensor) else list(state)


def _as_given(states: list[Tensor]) -> State:
    """The states as haste gives and takes them."""
    return states[0] if len(states) == 1 else (states[0], states[1])


def _validated(state: State, wanted: list[int] | tuple[list[int], ...]) -> list[Tensor]:
    """The states as a list.

    Raises:
        ValueError: the structure, the number of axes or a size differs from `wanted`.
    """
    given = _listed(state)
    shapes = list(wanted) if isinstance(wanted, tuple) else [wanted]
    if isinstance(state, (tuple, list)) != isinstance(wanted, tuple) or len(given) != len(shapes):
        raise ValueError(f"RNN state has invalid structure; expected {wanted}")
    for tensor, shape in zip(given, shapes):
        if tensor.dim() != len(shape):
            raise ValueError(f"RNN state dimension mismatch; expected {len(shape)} got {tensor.dim()}")
        for axis, (got, want) in enumerate(zip(tensor.shape, shape)):
            if got != want:
                raise ValueError(f"RNN state size mismatch on dim {axis}; expected {want} got {got}")
    return given


def _to_native_weights(self: _Layer) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter, nn.Parameter]:
    """weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0 of the `torch.nn` layer that computes the same.

    haste splits the LSTM's bias in two halves; here bias_ih_l0 has all of it.
    """
    ours = self._ours()
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    weight_ih, weight_hh, bias_ih, bias_hh = (nn.Parameter(ours[name].detach().clone()) for name in names)
    return weight_ih, weight_hh, bias_ih, bias_hh


def _from_native_weights(
    self: _Layer, weight_ih_l0: Tensor, weight_hh_l0: Tensor, bias_ih_l0: Tensor, bias_hh_l0: Tensor
) -> None:
    """Take over the weights of a `torch.nn` layer; as in haste, the parameters become new objects."""
    ours = {"weight_ih": weight_ih_l0, "weight_hh": weight_hh_l0, "bias_ih": bias_ih_l0, "bias_hh": bias_hh_l0}
    for name, value in self._foreign({key: tensor.detach() for key, tensor in ours.items()}).items():
        setattr(self, name, nn.Parameter(value))


class _LSTM(_Layer):
    """haste's arguments of both LSTMs."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        batch_first: bool = False,
        forget_bias: float = 1.0,
        dropout: float = 0.0,
        zoneout: float = 0.0,
        return_state_sequence: bool = False,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            batch_first=batch_first,
            forget_bias=forget_bias,
            dropout=dropout,
            zoneout=zoneout,
            return_state_sequence=return_state_sequence,
        )


class _GRU(_Layer):
    """haste's arguments of both GRUs."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        batch_first: bool = False,
        dropout: float = 0.0,
        zoneout: float = 0.0,
        return_state_sequence: bool = False,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            batch_first=batch_first,
            dropout=dropout,
            zoneout=zoneout,
            return_state_sequence=return_state_sequence,
        )


class _IndRNN(_Layer):
    """haste's arguments of both IndRNNs."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        batch_first: bool = False,
        zoneout: float = 0.0,
        return_state_sequence: bool = False,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            batch_first=batch_first,
            zoneout=zoneout,
            return_state_sequence=return_state_sequence,
        )


class LSTM(_LSTM):
    """haste_pytorch.LSTM: `kernel [I, 4H]`, `recurrent_kernel [H, 4H]`, `bias [4H]`, gates i g f o.

    >>> y, (h_n, c_n) = LSTM(3, 5, zoneout=0.1, dropout=0.05)(torch.zeros(7, 2, 3))
    """

    table = tables.lstm()
    to_native_weights = _to_native_weights
    from_native_weights = _from_native_weights


class LayerNormLSTM(_LSTM):
    """haste_pytorch.LayerNormLSTM: `LSTM`'s parameters, `gamma [2, 4H]`, `gamma_h [H]`, `beta_h [H]`.

    >>> y, (h_n, c_n) = LayerNormLSTM(3, 5, zoneout=0.1, dropout=0.05)(torch.zeros(7, 2, 3))
    """

    table = tables.layer_norm_lstm()


class GRU(_GRU):
    """haste_pytorch.GRU: `kernel [I, 3H]`, `recurrent_kernel [H, 3H]`, `bias`, `recurrent_bias [3H]`, gates z r h.

    >>> y, h_n = GRU(3, 5, zoneout=0.1, dropout=0.05)(torch.zeros(7, 2, 3))
    """

    table = tables.gru()
    to_native_weights = _to_native_weights
    from_native_weights = _from_native_weights


class LayerNormGRU(_GRU):
    """haste_pytorch.LayerNormGRU: `GRU`'s parameters and `gamma [2, 3H]`.

    >>> y, h_n = LayerNormGRU(3, 5, zoneout=0.1, dropout=0.05)(torch.zeros(7, 2, 3))
    """

    table = tables.layer_norm_gru()


class IndRNN(_IndRNN):
    """haste_pytorch.IndRNN: `kernel [I, H]`, `recurrent_scale [H]`, `bias [H]`.

    >>> y, h_n = IndRNN(3, 5, zoneout=0.1)(torch.zeros(7, 2, 3))
    """

    table = tables.indrnn()


class LayerNormIndRNN(_IndRNN):
    """haste_pytorch.LayerNormIndRNN: `IndRNN`'s parameters and `gamma [2, H]`, whose second row is never read.

    >>> y, h_n = LayerNormIndRNN(3, 5, zoneout=0.1)(torch.zeros(7, 2, 3))
    """

    table = tables.layer_norm_indrnn()
