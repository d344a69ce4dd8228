"""A time limit for work that has none of its own."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """Returns what `work` returns or raises, or TimeoutError after `seconds`: in a thread, left behind where it is
    stuck.

    For what has no bound of its own: the resolution of a name, a service process that has stopped.
    """
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    if not wait([outcome], seconds).done:
        raise TimeoutError(f"nothing after {seconds:g} s")
    return outcome.result()
