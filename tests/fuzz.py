"""Random use of Festina, for as long as you like: right calls give right numbers, wrong ones an error, and no file a crash.

    make fuzz SECONDS=600                 # ten minutes, shared by all targets
    make fuzz ARGS="calls --seed 17"      # one target from another seed

Each example follows from the seed and its number alone. A failure prints both; of an example that ends the process, the last
line of build/fuzz/<target> tells them. `tests/test_fuzz.py` runs the first few of each target.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import math
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import torch
from cases import TYPICAL, plans
from samples import listed
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import festina
from festina import NormPlan, backends, norms
from festina.backends import cpu
from festina.convert import files
from festina.spec import CELLS, LayerSpec
from festina.testing import FEATURES, Case, widened, worst

sys.path.append(str(Path(__file__).parent / "cpu"))
from wrong_calls import PASSES, Right, run_spoilt

cpu.plans.usable_cores = lambda: 64  # more threads than cores find more orders of events

Rng = random.Random

LAYERS = {"lstm": festina.LSTM, "gru": festina.GRU, "indrnn": festina.IndRNN}
STEPS, ROWS = [0, 1, 2, 3, 3, 5, 5, 9, 30], [0, 1, 2, 3, 5, 17, 33]
WIDTHS = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 48, 63, 64, 65, 129]
TIMES_EAGER = 30
"""How far from float64 results may be, in errors of eager in the same dtype: a recurrence amplifies the first rounding that
differs, by up to 6 over 100 steps. A wrong number is off by thousands."""
SLACK = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
HOPELESS = 0.05
"""From this error of eager on, nothing is compared but NaN: a norm over nearly equal numbers has no digits to lose."""


# Right calls


def laid_out(rng: Rng, tensor: Tensor) -> Tensor:
    """The same numbers somewhere else: as they are, turned, with gaps between rows, or off a multiple of 16 bytes."""
    way = rng.randrange(4)
    if way == 1 and tensor.dim() > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if way == 2 and tensor.dim():
        return torch.cat([tensor, torch.full_like(tensor, math.nan)], -1)[..., : tensor.shape[-1]]
    if way == 3:
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    return tensor


class Drawn:
    """A layer in some dtype and the same numbers in float64, with everything that a call may take."""

    def __init__(self, rng: Rng) -> None:
        cell = rng.choice([*LAYERS])
        plan = rng.choice([*TYPICAL[cell], *plans(CELLS[cell])])
        I, H = rng.choice(WIDTHS), rng.choice(WIDTHS)
        self.dtype = rng.choice([*3 * [torch.float32], torch.float64, torch.bfloat16, torch.float16])
        self.batch_first = rng.random() < 0.3
        options: dict[str, Any] = {
            "num_layers": rng.choice([1, 1, 2]),
            "bias": rng.random() < 0.8,
            "bidirectional": rng.random() < 0.3,
            "batch_first": self.batch_first,
            "zoneout": rng.choice([0, 0, 0.2, 1]),
            "norm": plan,
        }
        if cell == "lstm":
            options["zoneout_cell"] = rng.choice([0, 0, 0.1, 1])
            if H > 1 and rng.random() < 0.3:
                options["proj_size"] = rng.randrange(1, H)
        torch.manual_seed(rng.randrange(2**31))
        self.layer = LAYERS[cell](I, H, dtype=self.dtype, **options)
        with torch.no_grad():
            for name, parameter in self.layer.named_parameters():
                if name.startswith(("gain", "bias")):
                    parameter += 0.3 * torch.randn_like(parameter)
                parameter.data = laid_out(rng, parameter.data)
        self.wide = LAYERS[cell](I, H, dtype=torch.float64, **options)
        self.wide.load_state_dict(self.layer.state_dict())
        self.T, self.B = rng.choice(STEPS), rng.choice(ROWS)
        is_batched = self.B > 0 and rng.random() < 0.9
        if not is_batched:
            self.B = 1
        shape = (self.B, self.T) if self.batch_first else (self.T, self.B)
        self.x = laid_out(rng, torch.randn(*(shape if is_batched else (self.T,)), I, dtype=self.dtype))
        rows = self.layer.num_layers * self.layer.spec.directions
        lead = (rows, self.B) if is_batched else (rows,)
        self.hx: list[Tensor] | None = None
        if rng.random() < 0.5:
            widths = (self.layer.output_size, H)[: len(self.layer.spec.cell.states)]
            self.hx = [laid_out(rng, torch.randn(*lead, width, dtype=self.dtype)) for width in widths]
        self.extra: dict[str, Any] = {}
        if rng.random() < 0.4:
            resets = torch.rand(shape if is_batched else (self.T,)) < 0.2
            self.extra["resets"] = laid_out(rng, resets)
        self.lengths = None
        if is_batched and rng.random() < 0.5:
            self.lengths = [rng.randrange(0, self.T + 1) for _ in range(self.B)]
            self.extra["lengths"] = self.lengths
        self.is_packed = self.lengths is not None and min(self.lengths, default=0) > 0 and rng.random() < 0.3
        if self.is_packed:
            self.extra.pop("lengths")
            if "resets" in self.extra:
                longest = max(self.lengths or [0])
                resets = self.extra["resets"]
                self.extra["resets"] = resets[:, :longest] if self.batch_first else resets[:longest]
        training = rng.random() < 0.5
        self.layer.train(training)
        self.wide.train(training)
        self.seed = rng.randrange(2**31)
        self.threads = rng.choice([1, 1, 2, 3, 8])
        self.is_recorded = rng.random() < 0.7

    def __str__(self) -> str:
        state = None if self.hx is None else [list(one.shape) for one in self.hx]
        return (
            f"{self.layer!r} {self.dtype}, x {list(self.x.shape)}, hx {state}, {[*self.extra]}, packed {self.is_packed}, "
            f"training {self.layer.training}, {self.threads} threads, recorded {self.is_recorded}"
        )

    def results(self, layer: Any, backend: str) -> dict[str, Tensor]:
        """Outputs, last states and gradients, of one backend or the default."""
        dtype = next(layer.parameters()).dtype
        torch.manual_seed(self.seed)  # Zoneout's masks
        x = self.x.detach().to(dtype).requires_grad_(self.is_recorded)
        state = (
            None if self.hx is None else [one.detach().to(dtype).requires_grad_(self.is_recorded) for one in self.hx]
        )
        hx = None if state is None else tuple(state) if len(state) > 1 else state[0]
        given: Any = x
        if self.is_packed:
            given = pack_padded_sequence(x, torch.tensor(self.lengths), self.batch_first, enforce_sorted=False)
        chosen = backends.use(backend) if backend else nullcontext()
        with chosen, torch.set_grad_enabled(self.is_recorded):
            output, last = layer(given, hx, **self.extra)
        outputs = [output.data if isinstance(output, PackedSequence) else output, *listed(last)]
        found = {f"output {i}": one.detach() for i, one in enumerate(outputs)}
        if self.is_recorded:
            leaves = {"x": x, **dict(layer.named_parameters()), **{f"hx {i}": one for i, one in enumerate(state or [])}}
            pairs = [
                (one, torch.linspace(-1, 1, one.numel(), dtype=torch.float64).view(one.shape).to(dtype))
                for one in outputs
            ]
            pairs = [pair for pair in pairs if pair[0].requires_grad]
            gradients = torch.autograd.grad(
                [one for one, _ in pairs],
                [*leaves.values()],
                [one for _, one in pairs],
                allow_unused=True,
                materialize_grads=True,
            )
            found |= {f"d_{name}": gradient for name, gradient in zip(leaves, gradients)}
        return found


def is_wrong(error: float, base: float, dtype: torch.dtype) -> bool:
    """Whether a result with this error from float64 cannot be explained by rounding; `base` is eager's error."""
    return base < HOPELESS and not error <= TIMES_EAGER * base + SLACK.get(dtype, SLACK[torch.bfloat16])


def calls(rng: Rng) -> None:
    """A random layer under random options agrees with the reference in float64, about as well as eager in its dtype."""
    drawn = Drawn(rng)
    before = torch.get_num_threads()
    torch.set_num_threads(drawn.threads)
    try:
        want = drawn.results(drawn.wide, "eager")
        ours, eagers = drawn.results(drawn.layer, ""), drawn.results(drawn.layer, "eager")
    finally:
        torch.set_num_threads(before)
    (error, name), base = worst(ours, want), worst(eagers, want)[0]
    if is_wrong(error, base, drawn.dtype):
        raise AssertionError(f"{name} differs by {error:.1e}, eager's worst by {base:.1e}: {drawn}")


# Wrong calls


def random_case(rng: Rng) -> Case:
    cell = rng.choice([*CELLS])
    features = [name for name in FEATURES if name != "zoneout_cell" or "c" in CELLS[cell].states]
    chosen = tuple(sorted(set(rng.sample(features, rng.randrange(4))), key=FEATURES.index))
    plan = rng.choice(plans(CELLS[cell]))
    return Case(cell, plan, T=rng.choice([1, 3, 9]), B=rng.choice([2, 5]), I=rng.choice([1, 4, 17]), H=rng.choice([1, 9, 33]),
                features=chosen, seed=rng.randrange(1000))  # fmt: skip


def spoilt(rng: Rng, tensor: Tensor | None) -> Tensor | None:
    """Another tensor in its place: another shape, dtype, values or device, or none."""
    if tensor is None:
        return rng.choice([None, torch.zeros(0), torch.ones(2, 3, dtype=torch.bool), torch.tensor([2, 1])])
    ways: list[Callable[[Tensor], Tensor | None]] = [
        lambda t: None,
        lambda t: t[: len(t) // 2],
        lambda t: torch.cat([t, t]),
        lambda t: t.unsqueeze(0),
        lambda t: t.flatten(),
        lambda t: t.to(
            rng.choice([torch.float64, torch.int32, torch.int64, torch.bool, torch.float16, torch.complex64])
        ),
        lambda t: t.to("meta"),
        lambda t: t.to_sparse() if t.dtype.is_floating_point else t,
        lambda t: t.new_empty(0),
        lambda t: t.new_zeros(()),
        lambda t: t.flip(0),
        lambda t: -t if t.dtype != torch.bool else ~t,
        lambda t: t + rng.choice([1, 2**20]) if t.dtype == torch.int64 else t,
        lambda t: t[:1].expand_as(t) if len(t) else t,
        lambda t: t.transpose(0, -1),
    ]
    return rng.choice(ways)(tensor)


FIELDS = (
    "input",
    "h_0",
    "c_0",
    "batch_sizes",
    "resets",
    "zoneout_mask",
    "zoneout_cell_mask",
    "parameters",
    "rates",
    "layer",
)


def wrong(rng: Rng) -> None:
    """A call with one or two fields spoilt is an error, or is right; by every operator, forward and backward."""
    case = random_case(rng)
    call, cotangents = case.build()
    for field in rng.sample(FIELDS, rng.choice([1, 1, 2])):
        if field == "parameters":
            parameters = list(call.parameters)
            index = rng.randrange(len(parameters))
            new = spoilt(rng, parameters[index])
            parameters[index : index + 1] = [] if new is None else [new]
            call = replace(call, parameters=tuple(parameters))
        elif field == "rates":
            call = replace(call, zoneout=rng.choice([-1.0, 0.5, 2.0, math.nan, math.inf]))
        elif field == "layer":
            call = replace(call, layer=random_case(rng).layer)
        else:
            call = replace(call, **{field: spoilt(rng, getattr(call, field))})
    if call.h_0 is None or call.input is None:
        return
    way = rng.randrange(3)
    try:
        if way == 0:
            found = [*festina.dispatch.run(call)]
        elif way == 1:
            arguments = festina.ops.arguments(call, rng.choice(["", "cpu", "eager"]))
            found = [torch.ops.festina.recurrence(*arguments)[0]]
        else:
            output, _, saved = torch.ops.festina.recurrence_train(*festina.ops.arguments(call, "cpu"))
            gradients = [spoilt(rng, one) if rng.random() < 0.5 else one for one in cotangents]
            kept = [spoilt(rng, one) if rng.random() < 0.2 else one for one in saved]
            flags = [rng.random() < 0.7 for _ in range(rng.choice([len(call.tensors()), len(call.tensors()), 3]))]
            arguments = festina.ops.arguments(call, "cpu")
            found = torch.ops.festina.recurrence_backward(*arguments, output, kept, *(*gradients, None)[:3], flags)
            return  # of other saved numbers, other gradients
    except (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError, IndexError) as error:
        if "INTERNAL ASSERT" in str(error):
            raise AssertionError(f"an internal error reached the user: {error}") from error
        return
    if all(one.is_cpu for one in found if one is not None):
        want = {"output": festina.reference.run(widened(call))[0]}
        error = worst({"output": found[0]}, want)[0]
        base = worst({"output": festina.reference.run(call)[0]}, want)[0]
        if is_wrong(error, base, call.input.dtype):
            raise AssertionError(f"accepted, and the output differs by {error:.1e}, eager's by {base:.1e}: {case}")


def spoilt_structs(rng: Rng) -> None:
    """The core refuses a struct with wrong numbers or nulls, or carries it out."""
    right = Right(rng.choice(PASSES), rng.choice([*CELLS]), ragged=rng.random() < 0.5)
    for _ in range(50):
        run_spoilt(right, rng)


# Files and texts


def damaged(rng: Rng, data: bytes) -> bytes:
    """The bytes with some of them changed, cut, repeated or inserted."""
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at = rng.randrange(len(found) + 1)
        way = rng.randrange(5)
        if way == 0 and at < len(found):
            found[at] = rng.randrange(256)
        elif way == 1:
            del found[at:]
        elif way == 2:
            found[at:at] = rng.randbytes(rng.choice([1, 4, 100]))
        elif way == 3:
            end = min(len(found), at + rng.choice([1, 8, 64]))
            found[at:end] = rng.choice([b"\x00", b"\xff", b"9"]) * (end - at)
        else:
            del found[at : at + rng.choice([1, 8, 64])]
    return bytes(found)


def read_files(rng: Rng) -> None:
    """A damaged file is read, or refused with an error that names it."""
    suffix = rng.choice([".pt", ".npz", ".safetensors", ".h5"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"layer{suffix}"
        state = {"weight": torch.randn(3, 4), "nested.bias": torch.randn(5), "count": torch.arange(3)}
        if suffix == ".h5":
            with h5py.File(path, "w") as file:
                file.update({name: tensor.numpy() for name, tensor in state.items()})
        else:
            files.write(path, state)
        path.write_bytes(damaged(rng, path.read_bytes()))
        try:
            found = files.read(path)
        except (files.FileError, OSError) as error:
            if str(path) not in str(error):
                raise AssertionError(f"the error does not name the file: {error}") from error
            return
        if sum(one.nbytes for one in found.values()) > 1 << 20:
            raise AssertionError(f"a small file gave {sum(one.nbytes for one in found.values())} bytes")


VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    1e-5,
    1e400,
    math.nan,
    "",
    "none",
    "all",
    "layer",
    "carried",
    [],
    {},
    [1],
    "x" * 1000,
    10**400,
]


def read_plans(rng: Rng) -> None:
    """A damaged plan is refused by ValueError or TypeError, or is a plan that comes back from its own text."""
    plan = rng.choice([*norms.PLANS.values()])
    fields = json.loads(plan.to_json())
    for _ in range(rng.choice([0, 1, 2])):
        fields[rng.choice([*fields, "more"])] = rng.choice(VALUES)
    text = json.dumps(fields)
    if rng.random() < 0.5:
        text = damaged(rng, text.encode()).decode(errors="replace")
    if rng.random() < 0.05:
        text = rng.choice("[{") * 100_000
    layer = LayerSpec(CELLS["lstm"], norms.NONE).token
    for read in (NormPlan.from_json, LayerSpec.parse):
        if read == LayerSpec.parse and rng.random() < 0.5:
            text = damaged(rng, layer.encode()).decode(errors="replace")
        try:
            found = read(text)
        except (ValueError, TypeError):
            continue
        if isinstance(found, NormPlan) and not (
            math.isfinite(found.eps) and NormPlan.from_json(found.to_json()) == found
        ):
            raise AssertionError(f"{text!r} was read as {found!r}")


TARGETS: dict[str, Callable[[Rng], None]] = {
    "calls": calls,
    "wrong": wrong,
    "structs": spoilt_structs,
    "files": read_files,
    "plans": read_plans,
}


def examples(
    target: str,
    seed: int,
    *,
    first: int = 0,
    seconds: float = math.inf,
    count: float = math.inf,
    log: Path | None = None,
) -> int:
    """Run examples of a target from number `first` on, and say how many there were.

    Raises:
        AssertionError: one failed; the text is the command that repeats it, the cause what went wrong.
    """
    end, number = time.monotonic() + seconds, first
    while time.monotonic() < end and number < first + count:
        if log is not None:
            log.write_text(f"{target} --seed {seed} --first {number}\n")
        try:
            TARGETS[target](random.Random(f"{target} {seed} {number}"))
        except Exception as error:
            raise AssertionError(f"python tests/fuzz.py {target} --seed {seed} --first {number}") from error
        number += 1
    return number - first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all unless some are named")
    parser.add_argument("--seconds", type=float, default=600, help="shared by the targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first example of each target")
    args = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("ignore")  # drawn at random, some layers are not worth having
    folder = Path("build/fuzz")
    folder.mkdir(parents=True, exist_ok=True)
    targets = args.targets or [*TARGETS]
    for target in targets:
        count = examples(target, args.seed, first=args.first, seconds=args.seconds / len(targets), log=folder / target)
        print(f"{target}: {count} examples", flush=True)


if __name__ == "__main__":
    sys.exit(main())
