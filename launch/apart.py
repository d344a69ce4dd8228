"""Modules are never imported from the folder that a person works in: a `train.py` of theirs would take ours' place.

An editable install finds our packages last, after every entry of `sys.path`. Thus the working folder leaves the path
of this process and of all that it starts, however it came there: `python -m`, `python -c` (multiprocessing's way to
start processes), an empty entry of PYTHONPATH. A checkout in which somebody works is ours, and stays.
"""

import contextlib
import os
import sys
import sysconfig
from collections.abc import Iterator

_SAFE, _PATH = "PYTHONSAFEPATH", "PYTHONPATH"


def clean(path: list[str]) -> list[str]:
    """The entries of `path` without the working folder."""
    try:
        here = os.path.realpath(os.getcwd())
    except OSError:  # it was deleted
        return [entry for entry in path if entry]
    ours = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    folders = {ours, *(os.path.realpath(folder) for folder in sysconfig.get_paths().values())}
    if here in folders:
        return [entry or here for entry in path]
    return [entry for entry in path if entry and os.path.realpath(entry) != here]


def shield() -> None:
    """Keep the working folder off the path of this process and, by its environment, of all that it starts."""
    sys.path[:] = clean(sys.path)
    os.environ[_SAFE] = "1"
    if path := os.environ.get(_PATH):
        os.environ[_PATH] = os.pathsep.join(clean(path.split(os.pathsep)))


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """The same for the processes that are started while entered."""
    before = {name: os.environ.get(name) for name in (_SAFE, _PATH)}
    shield()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
