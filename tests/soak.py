"""An hour of everything at once: eight threads and two processes train, infer and convert on shared layers, under load.

    make soak SECONDS=3600

Each thread and process repeats a piece of work whose result is known, and compares it every time. Memory is looked at every
few seconds, and what every worker has done: it fails on a wrong number, on a worker that has stopped, and on memory that
grows after the first fifth of the time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import festina
from festina import backends, convert
from festina.convert import files

THREADS, PROCESSES = 8, 2
MOST_GROWTH = 64 << 20
"""Bytes by which the process may grow after the first fifth of the time: allocators keep pieces of what they gave."""
MOST_SILENCE_S = 60

Work = Callable[[int], None]
"""One round of some work by its number.

Raises:
    AssertionError: its result is wrong.
"""


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def inference() -> Work:
    """Calls of changing lengths, and single steps, on layers that all threads share."""
    torch.manual_seed(0)
    layers = [festina.LayerNormLSTM(24, 48), festina.LayerNormGRU(24, 40, bidirectional=True), festina.LSTM(24, 33)]
    x = torch.randn(12, 5, 24)
    with torch.no_grad(), backends.use("eager"):
        want = [layer(x)[0] for layer in layers]
        cells = [layer.cell() for layer in layers[::2]]
        steps = [cell(x[0]) for cell in cells]

    def work(number: int) -> None:
        with torch.no_grad():
            layer, expected = layers[number % 3], want[number % 3]
            close(layer(x)[0], expected)
            rows = 1 + number % 5
            if not layer.bidirectional:
                close(layer(x[: 1 + number % 12, :rows])[0], expected[: 1 + number % 12, :rows])
            close(cells[number % 2](x[0])[0], steps[number % 2][0])

    return work


def training() -> Work:
    """A few steps of SGD from the same start, with lengths and resets: the loss at the end is known."""
    torch.manual_seed(1)
    start = festina.LayerNormLSTM(16, 32, num_layers=2, dtype=torch.float64).state_dict()
    x, resets = torch.randn(10, 6, 16, dtype=torch.float64), torch.rand(10, 6) < 0.1

    def losses(backend: str = "cpu") -> Tensor:
        layer = festina.LayerNormLSTM(16, 32, num_layers=2, dtype=torch.float64)
        layer.load_state_dict(start)
        found = []
        with backends.use(backend):
            for _ in range(3):
                output, _ = layer(x, lengths=[10, 3, 7, 7, 1, 9], resets=resets)
                loss = output.square().mean()
                loss.backward()
                with torch.no_grad():
                    for parameter in layer.parameters():
                        parameter -= 0.1 * parameter.grad
                        parameter.grad = None
                found.append(loss.detach())
        return torch.stack(found)

    want = losses("eager")

    def work(number: int) -> None:
        close(losses(), want)

    return work


def conversion() -> Work:
    """A layer through a file of another project's format, and back."""
    torch.manual_seed(2)
    layer = festina.LayerNormLSTM(8, 12)
    state = layer.state_dict()

    def work(number: int) -> None:
        suffix = (".pt", ".npz")[number % 2]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"theirs{suffix}"
            files.write(path, convert.dump("haste.LayerNormLSTM", layer))
            loaded = convert.load("haste.LayerNormLSTM", files.read(path)).state_dict()
        for name, value in state.items():
            torch.testing.assert_close(loaded[name], value, rtol=0, atol=0)

    return work


MAKERS = (inference, training, inference, conversion)


class Worker(threading.Thread):
    """Repeats a piece of work until it is told to stop, or the work fails."""

    def __init__(self, work: Work, stop: threading.Event, threads: int) -> None:
        super().__init__(daemon=True)
        self.work, self.stop_event, self.threads = work, stop, threads
        self.rounds, self.last, self.error = 0, time.monotonic(), ""

    def run(self) -> None:
        torch.set_num_threads(self.threads)
        while not self.stop_event.is_set():
            try:
                self.work(self.rounds)
            except Exception as error:
                self.error = f"{self.work.__qualname__}, round {self.rounds}: {error!r}"
                return
            self.rounds, self.last = self.rounds + 1, time.monotonic()


def soak(seconds: float, threads: int = THREADS) -> str:
    """Work in as many threads; what was done.

    Raises:
        AssertionError: a wrong number, a worker that has stopped, or memory that grows.
    """
    works, stop = [make() for make in MAKERS], threading.Event()
    workers = [Worker(works[i % len(works)], stop, threads=1 + i % 3) for i in range(threads)]
    for worker in workers:
        worker.start()
    begin, settled, most = time.monotonic(), 0, 0
    try:
        while (now := time.monotonic()) < begin + seconds:
            time.sleep(min(2.0, seconds / 10))
            for worker in workers:
                assert not worker.error, worker.error
                assert now - worker.last < MOST_SILENCE_S, (
                    f"{worker.work.__qualname__} has not finished a round in a minute"
                )
            if now < begin + seconds / 5:
                settled = resident_bytes()
            else:
                most = max(most, resident_bytes())
                assert most - settled < MOST_GROWTH, f"memory grew from {settled >> 20} to {most >> 20} MB"
    finally:
        stop.set()
        for worker in workers:
            worker.join(MOST_SILENCE_S)
    rounds = sum(worker.rounds for worker in workers)
    return f"{rounds} rounds in {threads} threads, {settled >> 20} MB, at most {most >> 20} MB later"


def process(seconds: float, threads: int) -> None:
    print(soak(seconds, threads), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600)
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=process, args=(args.seconds, THREADS // PROCESSES)) for _ in range(PROCESSES)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(args.seconds + 3 * MOST_SILENCE_S)
    failed = [one.exitcode for one in processes if one.exitcode != 0]
    if failed:
        print(f"{len(failed)} of {PROCESSES} processes failed (exit codes {failed}; None: it hangs)", file=sys.stderr)
        for one in processes:
            one.kill()
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
