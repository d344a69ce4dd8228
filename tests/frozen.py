"""Takes what a process holds when it imports this out of Python's search for circles, in it and in what it forks."""

import gc

gc.freeze()
