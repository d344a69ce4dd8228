"""What must not happen while a file from elsewhere is read, and such files: any key of them has any value."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import strategies as st

DANGEROUS = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "socket.connect")


class Watched:
    """Notes what runs a command, unpickles, or opens for writing, while it is on: an audit hook is never taken back."""

    def __init__(self) -> None:
        self.on, self.seen = False, list[str]()
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple) -> None:
        if self.on and (
            event in DANGEROUS or event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        ):
            self.seen.append(f"{event} {args}")


WATCHED = Watched()


@contextmanager
def inert() -> Iterator[None]:
    """Fails where what is done inside runs, unpickles or writes anything."""
    WATCHED.on, WATCHED.seen = True, []
    try:
        yield
    finally:
        WATCHED.on = False
    assert not WATCHED.seen, WATCHED.seen


def change(data: Any, told: Any, values: st.SearchStrategy[Any]) -> None:
    """Draws one key of a nested dict or list, at any depth, and gives it one of `values` in place."""
    while True:
        key = data.draw(st.sampled_from(sorted(told) if isinstance(told, dict) else range(len(told))))
        if not (isinstance(told[key], dict | list) and told[key]) or data.draw(st.booleans()):
            break
        told = told[key]
    told[key] = data.draw(values)
