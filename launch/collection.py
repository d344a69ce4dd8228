"""The frequency of Python's search for circles among objects: low where modules are imported, whose objects stay.

It looks each time some hundred objects have come; importing torch makes a million, and takes a fifth longer for that.
"""

import gc

_USUAL = gc.get_threshold()
_SELDOM = (100_000, 20, 20)


def seldom() -> None:
    """Look for circles once in 100,000 objects."""
    gc.set_threshold(*_SELDOM)


def usual() -> None:
    """Look as often as Python does by itself, and not among what is there: neither here nor in what is forked from
    here, where looking would also copy each page that it comes by."""
    gc.freeze()
    gc.set_threshold(*_USUAL)
