"""Schedulers: a global batch in, a Plan out. Pure Python: a plan needs no process group and no GPU."""

from parallel.schedule.static import Static

SCHEDULERS: dict[str, type] = {"static": Static}
