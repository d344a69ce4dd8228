"""Guards of a run: steps that are left out, going back to a checkpoint, and how long a silence may last."""
