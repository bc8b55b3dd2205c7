"""Triton without a GPU: compile for an absent device, or interpret faster.

`compiling` lets the host's code run on CPU tensors with a driver that launches nothing: every kernel is specialised and
compiled exactly as on the device, and the resources that it would take are recorded.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

# Each target, and the bytes of shared memory that one program may have.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 << 10),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 << 10),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 << 10),
}


@dataclass(frozen=True)
class Compiled:
    """The resources of one specialisation of a kernel; spilled bytes and registers are per thread."""

    kernel: str
    shared_bytes: int
    spilled_bytes: int
    registers: int


class _Utils:
    """Reads each binary that Triton would load."""

    def __init__(self, target: GPUTarget, shared: int, found: list[Compiled]) -> None:
        self.target, self.shared, self.found = target, shared, found

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[None, None, int, int, int]:
        registers, spilled = resources(self.target, binary)
        self.found.append(Compiled(name, shared, spilled, registers))
        return None, None, registers, spilled, 1024

    def unload_module(self, module: object) -> None:
        pass


class _Driver:
    """An absent device: it names its target, takes binaries and starts nothing."""

    def __init__(self, target: GPUTarget, shared: int) -> None:
        self.found: list[Compiled] = []
        self.target, self.utils = target, _Utils(target, shared, self.found)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: object, metadata: object):
        return lambda *args: None


def resources(target: GPUTarget, binary: bytes) -> tuple[int, int]:
    """Registers per thread, and spilled bytes per thread."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(binary)
        file.flush()
        if target.backend == "cuda":
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            text = subprocess.run(
                [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
            ).stdout
            found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
            return found["REG"], found["STACK"] + found["LOCAL"]

    # The kernel's metadata are msgpack: after a key a byte, which is the value if below 128, or else its type.
    def field(key: bytes) -> int:
        start = binary.index(key) + len(key)
        kind = binary[start]
        if kind < 0x80:
            return kind
        size = {0xCC: 1, 0xCD: 2, 0xCE: 4}[kind]
        return int.from_bytes(binary[start + 1 : start + 1 + size], "big")

    return field(b".vgpr_count"), field(b".private_segment_fixed_size")


@contextmanager
def compiling(target: str) -> Iterator[list[Compiled]]:
    """Inside, kernels are compiled for `target` and not run; yields the list that they are added to."""
    from festina.backends.triton import direction, launch, loop_tier, norm, step_tier

    kernels = [
        k for module in (loop_tier, norm, step_tier) for k in vars(module).values() if hasattr(k, "device_caches")
    ]
    stand_in = _Driver(*TARGETS[target])
    with pytest.MonkeyPatch.context() as patch:
        for kernel in kernels:
            patch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
        patch.setattr(driver, "_active", stand_in)
        patch.setattr(launch, "WARP", stand_in.target.warp_size)
        if stand_in.target.backend == "hip":
            patch.setattr(direction, "LOOP_BYTES", 16 << 10)
        yield stand_in.found


def quicken_interpreter() -> None:
    """Let the interpreter replace `triton.language` once a launch, instead of at every call of a device function."""
    from triton.runtime import interpreter

    swap = interpreter._patch_lang
    standard = interpreter.tl.standard.sum.fn  # sees `triton.language.core`, as kernels see `triton.language`
    inside = []

    class Scope:
        def restore(self) -> None:
            while inside:
                inside.pop().restore()

    class Nothing:
        def restore(self) -> None:
            pass

    def swap_once(fn: object) -> Scope | Nothing:
        if inside:
            return Nothing()
        inside.extend((swap(fn), swap(standard)))
        return Scope()

    interpreter._patch_lang = swap_once
