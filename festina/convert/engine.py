"""One engine for every checkpoint format: a `Table` describes a state dict, `read` reads it and `write` writes it.

`read` splits every foreign tensor into blocks and adds up the blocks of each of Festina's parameters. `write` composes every
foreign tensor from Festina's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from festina.convert.layout import Block, Described, Layout, Shape, layout
from festina.layers import Recurrent
from festina.module import PLAN_KEY, plan_tensor, saved_plan
from festina.norms import NormPlan
from festina.spec import CellSpec, LayerSpec


class ConvertError(ValueError):
    """A state dict or a layer does not fit the format. The text lists everything that is wrong."""


@dataclass(frozen=True)
class Table:
    """How one project stores one kind of recurrent layer.

    Args:
        cell: the cell.
        plan: where its norms sit; None: the state dict holds the plan, as Festina's do.
        gates: the order of the gates in the project's tensors, one letter each, as in `cell.gates`.
        keys: the layout of each tensor by name. A name that ends in `?` is optional; the layer then lacks an inner bias, a
            projection or all biases that the state dict lacks. `{even}` and `{odd}` stand for 2l and 2l + 1.
        scopes: patterns of the full names: `{key}` is the name in `keys`, `{l}` the layer, `{d}` the direction (0 or 1),
            `{reverse}` "" or "_reverse", `{side}` "forward" or "backward", `{fw}` "fw" or "bw". `read` takes the scope that
            matches the most names, `write` the first one that distinguishes all layers and directions.
        aliases: other spellings of names in `keys`.
        stacked: names of tensors that hold all layers along a first axis; in `keys` their names end in `.{l}`.
        adapt: for names with parts that the user or the project chooses, and for tensors that tell variants apart: from the
            table and a state dict to the variant's table and the state dict under its names.
    """

    cell: CellSpec
    plan: NormPlan | None
    gates: str
    keys: Mapping[str, Described]
    scopes: tuple[str, ...] = ("{key}",)
    aliases: Mapping[str, str] = field(default_factory=dict)
    stacked: tuple[str, ...] = ()
    adapt: Callable[[Table, dict[str, Tensor]], tuple[Table, dict[str, Tensor]]] | None = None

    def layouts(self, present: Callable[[str], bool]) -> dict[str, Layout]:
        """The layout of each tensor by name; of the optional ones, those that are `present`."""
        return {
            key.rstrip("?"): layout(part)
            for key, part in self.keys.items()
            if not key.endswith("?") or present(key.rstrip("?"))
        }

    def full(self, key: str, scope: str, l: int, d: int) -> str:
        """The full name of `key` of layer `l`, direction `d`."""
        key = key.format(l=l, even=2 * l, odd=2 * l + 1)
        sides = {"reverse": ("", "_reverse")[d], "side": ("forward", "backward")[d], "fw": ("fw", "bw")[d]}
        return scope.format(key=key, l=l, d=d, **sides)

    def find(self, key: str, scope: str, l: int, d: int, state: Mapping[str, Tensor]) -> str:
        """`full`, in the spelling that `state` uses."""
        names = [self.full(spelling, scope, l, d) for spelling in (key, self.aliases.get(key, key))]
        return next((name for name in names if name in state), names[0])


def read(
    table: Table, state: Mapping[str, Tensor]
) -> tuple[LayerSpec, tuple[int, int, int], list[list[dict[str, Tensor]]]]:
    """Festina's parameters from the state dict that `table` describes. Autograd works through it.

    Returns:
        The spec; the sizes I, H, P; for each layer and direction the parameters by Festina's names.

    Raises:
        ConvertError: names are missing or unknown, or shapes are wrong; the error lists all of them.
    """
    state = dict(state)
    if table.adapt is not None:
        table, state = table.adapt(table, state)
    plan = table.plan
    if plan is None:
        plan = table.cell.named(_own_plan(table, state))
        state.pop(PLAN_KEY, None)
    for key in table.stacked:
        if key in state and state[key].numel():  # not [2**40, 0], which would come apart into 2**40 tensors
            state.update({f"{key}.{l}": part for l, part in enumerate(state.pop(key).unbind(0))})

    scope, L, D = _extent(table, state)
    present = table.layouts(lambda key: table.find(key, scope, 0, 0, state) in state)
    spec = specialise(table.cell, plan, present.values(), D)
    every = replace(spec, bias=True, projected=table.cell.projects).parameter_names
    layouts = {  # without tensors that have no place in the plan that the state dict itself holds: they are unknown
        key: part for key, part in present.items() if all(block.name in every for block in part.blocks())
    }
    names = {(l, d): {key: table.find(key, scope, l, d, state) for key in layouts} for l in range(L) for d in range(D)}
    expected = [name for here in names.values() for name in here.values()]
    fed = _fed(layouts.values())
    unfed = [name for name in spec.parameter_names if name not in fed and not name.startswith("bias")]
    missing = [name for name in expected if name not in state] + [table.full(name, scope, 0, 0) for name in unfed]
    unknown = sorted(state.keys() - set(expected))

    held = [(l, layouts[key], name) for (l, _), here in names.items() for key, name in here.items() if name in state]
    sizes = _solve(spec, [(part, tuple(state[name].shape)) for l, part, name in held if l == 0])
    if sizes is None:
        misshapen = [] if missing else [f"{name} {list(state[name].shape)}" for name in expected]
    else:
        checked = [_mismatch(spec, part, state[name], name, _shapes(spec, sizes, l)) for l, part, name in held]
        misshapen = [text for text in checked if text]
    _complain("the state dict does not fit", {"missing": missing, "unknown": unknown, "misshapen": misshapen})
    assert sizes is not None  # otherwise something was missing or misshapen
    parameters = [
        [
            assemble(spec, table.gates, [(layouts[key], state[name]) for key, name in names[l, d].items()], shapes)
            for d in range(D)
        ]
        for l in range(L)
        for shapes in [_shapes(spec, sizes, l)]
    ]
    return spec, sizes, parameters


def write(table: Table, layer: Recurrent) -> dict[str, Tensor]:
    """The state dict that `table` describes, from a layer of Festina. Autograd works through it.

    Raises:
        ConvertError: the format cannot hold the layer's function; the error lists every reason.
    """
    spec, L, D = layer.spec, layer.num_layers, layer.spec.directions
    layouts = table.layouts(
        lambda key: all(block.name in spec.parameter_names for block in layout(table.keys[key + "?"]).blocks())
    )
    plan = spec.plan if table.plan is None else table.plan
    places = [(l, d) for l in range(L) for d in range(D)]
    first = next(iter(layouts))
    scopes = [s for s in table.scopes if len({table.full(first, s, l, d) for l, d in places}) == len(places)]
    reasons = []
    if spec.cell != table.cell:
        reasons.append(f"the cell must be {table.cell.name}, got {spec.cell.name}")
    elif specialise(table.cell, plan, layouts.values(), D).plan != spec.plan:
        reasons.append(f"the norm plan must be {plan}, got {spec.plan}")
    if not scopes:
        reasons.append(f"the format has no names for {L} layers in {D} directions")
    _complain("the layer cannot be stored", {"because": reasons})

    state: dict[str, Tensor] = {}
    for l, d in places:
        names = spec.parameter_names
        held = dict(zip(names, layer.layer_parameters(l)[d * len(names) :]))
        sizes = (layer.input_size, layer.hidden_size, layer.output_size)
        shapes = _shapes(replace(spec, bias=True), sizes, l)
        parts = disassemble(spec, table.gates, layouts, held, shapes)
        state.update({table.full(key, scopes[0], l, d): part for key, part in parts.items()})
    for key in table.stacked:
        state[key] = torch.stack([state.pop(f"{key}.{l}") for l in range(L)])
    if table.plan is None and not spec.plan.is_none:
        state[PLAN_KEY] = plan_tensor(spec.plan)
    return state


def specialise(cell: CellSpec, plan: NormPlan, layouts: Iterable[Layout], directions: int) -> LayerSpec:
    """The spec of a layer with the biases and the projection that these tensors hold."""
    fed = _fed(layouts)
    plan = cell.fit(plan)
    held = replace(
        plan,
        inner_bias=plan.inner_bias and "bias_inner" in fed,
        inner_bias_hh=plan.inner_bias_hh and "bias_inner_hh" in fed,
    )
    if held != plan or not plan.name:
        plan = cell.named(replace(held, name=None))
    return LayerSpec(cell, plan, any(name.startswith("bias") for name in fed), "weight_hr" in fed, directions)


def assemble(
    spec: LayerSpec, order: str, tensors: Sequence[tuple[Layout, Tensor]], shapes: Mapping[str, Shape]
) -> dict[str, Tensor]:
    """Festina's parameters of one layer and direction, from foreign tensors; a shift that none of them holds is 0.

    Args:
        spec: the layer.
        order: the order of the gates in blocks that do not name theirs.
        tensors: layouts and their tensors.
        shapes: the shapes of Festina's parameters.
    """
    size = _sizer(spec, shapes)
    sums: dict[str, dict[str, Tensor]] = {}
    for part, foreign in tensors:
        for block, tensor in part.split(foreign, size):
            if block.unused:
                continue
            held = sums.setdefault(block.name, {})
            gates = _gates(spec, block, order)
            for gate, rows in zip(gates, tensor.chunk(len(gates)), strict=True):
                rows = rows + block.plus if block.plus and gate in (block.plus_gates or gates) else rows
                held[gate] = held[gate] + rows if gate in held else rows
    like = tensors[0][1]
    return {
        name: torch.cat([sums[name][gate] for gate in _gates(spec, Block(name))])
        if name in sums
        else like.new_zeros(shape)
        for name, shape in shapes.items()
    }


def disassemble(
    spec: LayerSpec,
    order: str,
    layouts: Mapping[str, Layout],
    parameters: Mapping[str, Tensor],
    shapes: Mapping[str, Shape],
) -> dict[str, Tensor]:
    """Foreign tensors of one layer and direction by name, from Festina's parameters: the inverse of `assemble`.

    A parameter that the layer lacks counts as 0. If a project adds up several tensors, the first gets the whole value.

    Raises:
        ConvertError: a parameter is not 0 and the format has no place for it.
    """
    every = [block for part in layouts.values() for block in part.blocks() if not block.unused]
    places = {name for block in every for name in (block.name, block.fold)}
    lost = [name for name, value in parameters.items() if name not in places and bool((value != 0).any())]
    _complain("the layer cannot be stored", {"no place for": lost})
    like = next(iter(parameters.values()))
    given: set[tuple[str, str]] = set()

    def get(block: Block) -> Tensor:
        if block.unused:
            return like.new_full(shapes[block.name], block.plus)
        value = parameters.get(block.name, like.new_zeros(shapes[block.name]))
        if block.fold and block.fold in parameters:
            value = value + parameters[block.fold]
        ours = _gates(spec, Block(block.name))
        by_gate = dict(zip(ours, value.chunk(len(ours)), strict=True))
        gates = _gates(spec, block, order)
        parts = []
        for gate in gates:
            rows = torch.zeros_like(by_gate[gate]) if (block.name, gate) in given else by_gate[gate]
            given.add((block.name, gate))
            parts.append(rows - block.plus if block.plus and gate in (block.plus_gates or gates) else rows)
        return torch.cat(parts)

    return {key: part.join(get) for key, part in layouts.items()}


def _shapes(spec: LayerSpec, sizes: tuple[int, int, int], l: int) -> dict[str, Shape]:
    """The shapes of the parameters of layer `l`; above the first, x is the output of all directions below."""
    I, H, P = sizes
    return spec.parameter_shapes(spec.directions * P if l else I, H, P)


def _own_plan(table: Table, state: Mapping[str, Tensor]) -> NormPlan:
    """The plan that a state dict of Festina holds."""
    try:
        plan = saved_plan(dict(state), "")
        if plan is not None:
            return table.cell.fit(plan)
    except (TypeError, ValueError) as error:
        raise ConvertError(f"{PLAN_KEY} must hold a norm plan as festina saves it: {error}") from None
    raise ConvertError(f"the state dict has gains but no norm plan: {PLAN_KEY} is missing")


def _fed(layouts: Iterable[Layout]) -> set[str]:
    """The names of Festina's parameters that these tensors hold, wholly or in part."""
    return {block.name for part in layouts for block in part.blocks() if not block.unused}


@cache
def _ungated(spec: LayerSpec) -> frozenset[str]:
    """The parameters that are not divided into gates."""
    shapes = replace(spec, bias=True).parameter_shapes(1, 1, 1)
    return frozenset(name for name, shape in shapes.items() if shape[0] != len(spec.cell.gates))


def _gates(spec: LayerSpec, block: Block, order: str = "") -> Sequence[str]:
    """The gates of a block, in its order; one unnamed gate if the parameter is not divided into gates."""
    return [""] if block.name in _ungated(spec) else block.gates or order or spec.cell.gates


def _sizer(spec: LayerSpec, shapes: Mapping[str, Shape]) -> Callable[[Block], Shape]:
    """A function from a block to its shape, given the shapes of Festina's parameters."""

    def size(block: Block) -> Shape:
        first, *rest = shapes[block.name]
        whole = len(_gates(spec, Block(block.name)))
        return (first // whole * len(_gates(spec, block, "".join(spec.cell.gates))), *rest)

    return size


def _axes(spec: LayerSpec, part: Layout) -> list[dict[str, int]]:
    """Each axis of a foreign tensor as multiples of the sizes I, H, P, with a constant under ""."""

    def shape(I: int, H: int, P: int) -> Shape:
        return part.shape(_sizer(spec, spec.parameter_shapes(I, H, P if spec.projected else H)))

    units = {"I": shape(1, 0, 0), "H": shape(0, 1, 0), "P": shape(0, 0, 1), "": shape(0, 0, 0)}
    constants = units[""]
    return [
        {name: unit[axis] - (constants[axis] if name else 0) for name, unit in units.items()}
        for axis in range(len(constants))
    ]


def _solve(spec: LayerSpec, held: Sequence[tuple[Layout, Shape]]) -> tuple[int, int, int] | None:
    """The sizes I, H, P that follow from the shapes, or None."""
    known: dict[str, int] = {}
    for _ in range(3):  # a round that finds no size finds none later, so three rounds suffice for three sizes
        for part, shape in held:
            for multiples, length in zip(_axes(spec, part), shape):
                unknown = [name for name, factor in multiples.items() if name and factor and name not in known]
                if len(unknown) == 1:
                    rest = length - multiples[""] - sum(multiples[name] * value for name, value in known.items())
                    value, remainder = divmod(rest, multiples[unknown[0]])
                    if value > 0 and not remainder:
                        known[unknown[0]] = value
    if not spec.projected and "H" in known:
        known["P"] = known["H"]
    return (known["I"], known["H"], known["P"]) if len(known) == 3 else None


def _mismatch(spec: LayerSpec, part: Layout, tensor: Tensor, name: str, shapes: Mapping[str, Shape]) -> str | None:
    """The problem with a foreign tensor, or None."""
    want = part.shape(_sizer(spec, shapes))
    if tuple(tensor.shape) != want:
        letters = ", ".join(
            " + ".join(f"{'' if factor == 1 and size else factor}{size}" for size, factor in axis.items() if factor)
            for axis in _axes(spec, part)
        )
        return f"{name} must be [{letters}] = {list(want)}, got {list(tensor.shape)}"
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        return f"{name} must hold floating-point numbers of 16, 32 or 64 bits, got {tensor.dtype}"
    return None


def _extent(table: Table, state: Mapping[str, Tensor]) -> tuple[str, int, int]:
    """The scope that matches the most names, and the numbers of layers and directions."""

    def found(scope: str, l: int, d: int) -> set[str]:
        return {table.find(key.rstrip("?"), scope, l, d, state) for key in table.keys} & state.keys()

    extents = []
    for scope in table.scopes:
        L = 1
        while found(scope, L, 0) - found(scope, 0, 0):
            L += 1
        D = 2 if found(scope, 0, 1) - found(scope, 0, 0) else 1
        hits = {name for l in range(L) for d in range(D) for name in found(scope, l, d)}
        extents.append((len(hits), scope, L, D))
    _, scope, L, D = max(extents, key=lambda extent: extent[0])
    return scope, L, D


def _complain(headline: str, problems: Mapping[str, Sequence[str]]) -> None:
    """Raise one error that lists every problem, if there are any."""
    lines = [f"  {what}: {'; '.join(texts)}" for what, texts in problems.items() if texts]
    if lines:
        raise ConvertError(
            "\n".join([f"{headline}:", *lines]) if len(lines) > 1 else f"{headline}: {lines[0].lstrip()}"
        )
