"""Show versions, devices, threads, environment variables, and which backends can run here and why the others cannot."""

from __future__ import annotations

import argparse
import json
import os
import platform
from typing import Any

import torch

import festina
from festina import backends, environment
from festina.call import Case


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs and bug reports")


def run(args: argparse.Namespace) -> int:
    facts = gather()
    print(json.dumps(facts, indent=2) if args.json else as_text(facts))
    return 0


def devices() -> list[dict[str, str]]:
    """The CPU and every accelerator that torch can use, with names."""
    found = [{"device": "cpu", "name": processor()}]
    found += [{"device": f"cuda:{i}", "name": torch.cuda.get_device_name(i)} for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU"})
    return found


def processor() -> str:
    """The CPU's name, from /proc/cpuinfo if possible: `platform` is less precise."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def backend_states() -> list[dict[str, Any]]:
    """Each backend, best first: per device, None if it runs a float32 LayerNormLSTM, otherwise the reason why not."""
    layer = festina.LayerNormLSTM(8, 8)
    states = []
    for name in backends.names():
        reasons = {}
        for kind in dict.fromkeys(found["device"].partition(":")[0] for found in devices()):
            reasons[kind] = dict(backends.reasons(Case(layer.spec, torch.float32, torch.device(kind))))[name]
        states.append({"backend": name, "reasons": reasons, "isa": backends.isa(name)})
    return states


def refusal() -> str | None:
    """What every call raises, because of `FESTINA_BACKEND`; what other variables do stands beside the backends."""
    try:
        backends.forced()
    except backends.BackendError as error:
        return str(error)
    return None


def gather() -> dict[str, Any]:
    """Everything that `festina info` prints."""
    return {
        "festina": festina.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": devices(),
        "threads": {"used": torch.get_num_threads(), "cores": os.cpu_count()},
        "backends": backend_states(),
        "environment": {variable.name: variable.value() for variable in environment.VARIABLES},
        "unknown": environment.unknown(),
        "refusal": refusal(),
    }


def as_text(facts: dict[str, Any]) -> str:
    """The facts as text, one per line."""
    rows = [(key, str(facts[key])) for key in ("festina", "torch", "python", "platform")]
    rows += [(found["device"], found["name"]) for found in facts["devices"]]
    rows.append(("threads", f"{facts['threads']['used']} of {facts['threads']['cores']} cores"))
    rows += [(key, "not set" if value is None else value) for key, value in facts["environment"].items()]
    rows += [(name, "festina reads no variable of this name") for name in facts["unknown"]]
    if facts["refusal"]:
        rows.append(("every call raises", facts["refusal"]))
    width = max(len(key) for key, _ in rows) + 2
    lines = [f"{key:<{width}}{value}" for key, value in rows]

    lines.append("backends, best first:")
    for state in facts["backends"]:
        isa = f" ({state['isa']})" if state["isa"] else ""
        for kind, reason in state["reasons"].items():
            lines.append(f"  {state['backend']:<{width - 2}}{kind}: {reason or f'ready{isa}'}")
    return "\n".join(lines)
