"""Checks before a process starts: a configuration that passes them is one that a run can begin with."""
