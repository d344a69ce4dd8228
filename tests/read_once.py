"""Has Hydra read each file of conf/ once in a process: a composition reads some thirty, and tests compose hundreds."""

import copy
import os
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

_HYDRAS = OmegaConf.load
_of_state = cache(lambda path, state: _HYDRAS(path))


def _loaded(file: Any) -> Any:
    if not isinstance(file, str | Path):
        return _HYDRAS(file)
    state = os.stat(file)  # a test may edit it
    return copy.deepcopy(_of_state(str(file), (state.st_mtime_ns, state.st_size, state.st_ino)))


OmegaConf.load = _loaded  # type: ignore[method-assign, assignment]
