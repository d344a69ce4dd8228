"""Schedulers: a global batch in, a Plan out. Pure Python: a plan needs no process group and no GPU."""

from parallel.schedule.adaptive.scheduler import Adaptive
from parallel.schedule.static import Static

SCHEDULERS: dict[str, type] = {"static": Static, "adaptive": Adaptive, "auto": Adaptive}
"""By the name of their file in conf/scheduler; `auto` is `adaptive` that takes the simpler plan where it is enough."""
