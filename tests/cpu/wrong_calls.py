"""The struct of a call as a caller in C fills it: a right one, to be spoilt, and one that is spoilt at random."""

from __future__ import annotations

import ctypes
import random
from ctypes import byref

import torch

from festina import norms
from festina.backends.cpu import abi, plans
from festina.testing import Case

PASSES = (abi.INFERENCE, abi.TRAINING, abi.BACKWARD)
ROOM = 1 << 20
"""Bytes behind every pointer of a call that `right` makes: more than any call needs whose sizes are at most as large."""


NEEDED = {
    abi.INFERENCE: ["input", "h_0", "c_0", "output", "h_n", "c_n", "panels", "workspace"],
    abi.TRAINING: ["input", "h_0", "c_0", "output", "h_n", "c_n", "panels", "workspace", "saved"],
    abi.BACKWARD: ["input", "h_0", "c_0", "output", "panels", "workspace", "saved"],
}


class Right:
    """A call that the core carries out, every pointer to a buffer of its own; `call` is to be changed at will."""

    def __init__(self, which: str, cell: str = "lstm", ragged: bool = False) -> None:
        core = abi.core()
        self.buffers: dict[str, torch.Tensor] = {}
        layer = Case(cell, norms.HASTE, features=("bidirectional",)).layer
        values = {**plans.constants(layer), "type": 0, "threads": 1, "T": 3, "B": 3, "I": 5, "H": 9, "P": 9, "N": 9}
        values["pass"] = core.layout.values["pass"][which]
        self.call = core.call(**values)
        for name in NEEDED[which] + (
            ["d_output", "d_h_n", "d_c_n", "d_input", "d_h_0", "d_c_0"] if which == abi.BACKWARD else []
        ):
            if "c" in layer.cell.states or "c_" not in name:
                setattr(self.call, name, self.address(name))
        for slot in plans.slots(layer):
            self.call.parameters[slot] = self.address(f"parameter {slot}")
            if which == abi.BACKWARD:
                self.call.d_parameters[slot] = self.address(f"gradient {slot}")
        self.sizes = torch.tensor([4, 3, 2] if ragged else [3, 3, 3])
        if ragged:
            self.call.B, self.call.batch_sizes = 4, self.sizes.data_ptr()

    def address(self, name: str) -> int:
        self.buffers[name] = torch.zeros(ROOM + 64, dtype=torch.uint8)
        return -(-self.buffers[name].data_ptr() // 64) * 64

    def refusal(self) -> str:
        """What the core says as it refuses to run the call."""
        assert abi.core().run(byref(self.call)) == abi.core().layout.values["status"]["error"]
        return str(abi.core().error())


def fields_of(type_name) -> list[str]:
    return [name for name, kind in abi.core().call._fields_ if kind is type_name]


NUMBERS = (0, 1, 2, -1, 3, 9, 2**31, 2**32, 2**40, 2**61 - 1, 2**62, 2**63 - 1, -(2**63))


def run_spoilt(right: Right, draw: random.Random) -> int:
    """The status of a call in which some numbers are others, or pointers null, which is `right` again afterwards.

    Raises:
        AssertionError: the core carried out a call for which the buffers may be too small.
    """
    core = abi.core()
    words, need, at = core.words.from_buffer(right.call), core.need(), core.at
    start = list(words)
    sizes = {name: words[at[name]] for name in ("T", "B", "I", "H", "P", "N")}
    of_number = sorted(at[name] for name in fields_of(ctypes.c_int64))
    others = {*of_number, *(at[name] for name in fields_of(ctypes.c_double))}
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        if draw.random() < 0.8:
            words[draw.choice(of_number)] = draw.choice(NUMBERS) % 2**64
        else:
            words[draw.choice([n for n in range(len(words)) if n not in others])] = 0
    fits = all(words[at[name]] <= size for name, size in sizes.items()) and words[at["threads"]] <= 3
    if not core.bytes(byref(right.call), byref(need)):
        fits &= max(need.panels, need.workspace, need.saved_fixed + 9 * need.saved_per_row) <= ROOM
    if not fits:
        words[at["workspace"]] = 0
    status = core.run(byref(right.call))
    assert status == 1 or (status == 0 and fits)
    words[:] = start
    return status
