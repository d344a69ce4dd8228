"""The proof of a layout: a small run on many ranks, held to the plain model in one process.

One side is what a run does: `train.build`, the trainer's steps, a plan, process groups, sharded weights. The other side
(`train.verify.alone`) has none of that: the model as `models/` has it, one document at a time, a loss and an
optimizer written down once more. Both leave a trace (`train.verify.trace`) of every tensor in the order in which it is
computed; the first one that differs by more than rounding can explain names the fault.

This is TTrace's idea (2506.09280), with its way to a tolerance: the plain model is run again from weights that differ
by less than anybody can mean, and whatever moves a tensor by that much is rounding.
"""

from train.verify.documents import EdgeCases

__all__ = ["EdgeCases"]
