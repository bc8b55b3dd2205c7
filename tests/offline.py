"""Triton without a GPU: compile for an absent device, or interpret faster.

`compiling` lets the host's code run on CPU tensors with a driver that launches nothing: every kernel is specialised and
compiled exactly as on the device, and the resources that it would take are recorded.
"""

from __future__ import annotations

import inspect
import itertools
import random
import re
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import max_shared_mem
from triton.runtime import JITFunction, driver

from festina.backends.triton.device import Device

TARGETS = {
    "sm_75": (GPUTarget("cuda", 75, 32), Device("cuda", 75, 40, 64 << 10)),  # T4
    "sm_80": (GPUTarget("cuda", 80, 32), Device("cuda", 80, 108, 163 << 10)),  # A100
    "sm_90": (GPUTarget("cuda", 90, 32), Device("cuda", 90, 132, 227 << 10)),  # H100, H200
    "gfx942": (GPUTarget("hip", "gfx942", 64), Device("hip", 0, 304, 64 << 10)),  # MI300X
}


@dataclass(frozen=True)
class Compiled:
    """The resources of one specialisation of a kernel; spilled bytes and registers are per thread."""

    kernel: str
    shared_bytes: int
    spilled_bytes: int
    registers: int
    binary: bytes


class _Utils:
    """Reads each binary that Triton would load."""

    def __init__(self, target: GPUTarget, shared: int, found: list[Compiled]) -> None:
        self.target, self.shared, self.found = target, shared, found

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[None, str, int, int, int]:
        registers, spilled = resources(self.target, binary)
        self.found.append(Compiled(name, shared, spilled, registers, binary))
        return None, "function", registers, spilled, 1024  # no module: nothing is unloaded

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
    from festina.backends.triton import launch, setup

    gpu, device = TARGETS[target]
    stand_in = _Driver(gpu, device.shared_bytes)
    with pytest.MonkeyPatch.context() as patch:
        for kernel in kernels():
            patch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
        patch.setattr(driver, "_active", stand_in)
        patch.setattr(launch, "WARP", gpu.warp_size)
        patch.setattr(setup, "device_of", lambda _: device)
        setup.forget()
        max_shared_mem.cache_clear()  # Triton asks each device once
        yield stand_in.found
    setup.forget()
    max_shared_mem.cache_clear()


def kernels() -> list[JITFunction]:
    """Every function under `triton.jit` of the backend."""
    from festina.backends.triton import direction, norm, one_launch, step_tier

    modules = (direction, norm, one_launch, step_tier)
    return [kernel for module in modules for kernel in vars(module).values() if isinstance(kernel, JITFunction)]


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


class Threads:
    """Every program of a grid in a thread of its own, so that programs can wait for each other in the interpreter.

    At every exchange with others a thread sleeps for a random time of up to `drift` seconds; or, before it posts, for 20 ms
    if its program is among the `late` ones. `absent` programs never run.
    """

    def __init__(self, drift: float = 0.0, late: Collection[int] = (), absent: Collection[int] = ()) -> None:
        self.drift, self.late, self.absent = drift, late, absent

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Until `patch` is undone."""
        from triton.runtime import interpreter

        here = threading.local()
        builder = interpreter.InterpreterBuilder
        load, exchange = builder.create_masked_load, builder.create_atomic_rmw

        def sleep() -> None:
            time.sleep(random.random() * self.drift)

        def masked_load(of, ptrs, mask, other, cache_policy, is_volatile):
            if is_volatile:
                sleep()
            return load(of, ptrs, mask, other, cache_policy, is_volatile)

        def atomic_rmw(of, *arguments):
            sleep()
            if here.index[0] in self.late:
                time.sleep(0.02)
            return exchange(of, *arguments)

        def run(executor, *arguments, **named):
            parameters = inspect.getfullargspec(executor.fn).args
            named = {name: value for name, value in named.items() if name in parameters}
            on_host, named_on_host = executor._init_args_hst(arguments, named)
            scope = interpreter._patch_lang(executor.fn)
            try:
                values = inspect.getcallargs(executor.fn, *on_host, **named_on_host)
                values = {
                    name: value if name in executor.constexprs else interpreter._implicit_cvt(value)
                    for name, value in values.items()
                }
                grid = (*executor.grid, 1, 1)[:3]
                interpreter.interpreter_builder.set_grid_dim(*grid)
                self._run_all(executor.fn, values, grid, here)
            finally:
                scope.restore()
            executor._restore_args_dev(arguments, on_host, named, named_on_host)

        patch.setattr(builder, "grid_idx", property(lambda _: here.index, lambda _, index: None), raising=False)
        patch.setattr(builder, "create_masked_load", masked_load)
        patch.setattr(builder, "create_atomic_rmw", atomic_rmw)
        patch.setattr(interpreter.GridExecutor, "__call__", run)

    def _run_all(self, fn, values, grid, here) -> None:
        errors: list[BaseException] = []

        def run(index: tuple[int, int, int]) -> None:
            here.index = index
            try:
                fn(**values)
            except BaseException as error:
                errors.append(error)

        programs = [index for index in itertools.product(*map(range, grid)) if index[0] not in self.absent]
        if len(programs) == 1:
            run(programs[0])
        else:
            threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in programs]
            random.shuffle(threads)
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive() and not errors:  # the others may wait for one that failed
                    thread.join(0.01)
        if errors:
            raise errors[0]
