"""launch puts a run on machines: spawned processes here (`local`), or Ray (`cluster`); one contract, one `Outcome`."""

import sys

from launch import apart

sys.path[:] = apart.clean(sys.path)
