"""launch puts a run on machines: spawned processes here (`local`), or Ray (`cluster`); one contract, one `Outcome`."""
