"""Long calls of the core, which a signal handler can end by raising, as Ctrl-C does."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from festina.backends.cpu import abi

GoOn = ctypes.CFUNCTYPE(ctypes.c_int)


def handled(caught: list[BaseException]) -> Iterator[int]:
    """Yields 1 as often as asked, and lets Python handle signals each time; ends with what a handler raises, in `caught`.

    Python runs handlers between its own instructions alone. A generator goes on inside of its `try`, so that none can raise
    outside; a function would begin outside of it.
    """
    try:
        while True:
            yield 1
    except BaseException as error:
        caught.append(error)


def run(function: Callable[..., int], words: Any, *rest: Any) -> int:
    """The status of `function(words, *rest)`. On the main thread signal handlers run meanwhile, about every 0.1 s.

    Args:
        function: `run` or `run_panels` of the core.
        words: of the call.

    Raises:
        BaseException: what a handler raised. What the call was to write is half-written then.
    """
    if threading.get_ident() != threading.main_thread().ident:
        return function(words, *rest)  # Python handles signals on the main thread alone
    caught: list[BaseException] = []
    core, signals = abi.core(), handled(caught)
    at = core.at["go_on"]
    next(signals)
    go_on = GoOn(partial(next, signals, 0))
    words[at] = ctypes.cast(go_on, ctypes.c_void_p).value
    status = function(words, *rest)
    words[at] = 0
    if status == core.ended:
        raise caught.pop() if caught else KeyboardInterrupt  # several signals at once
    return status
