"""Adaptive groups: every batch gets the sequence-parallel groups that suit its lengths.

    cost      what a micro-step costs, from layers, wires and memory; fit: its constants from measured times,
              shapes: from what a model multiplies and sends
    profiles  published models and clusters
    packing   which sequences run where in one step
    planner   the fast planner; improve: its last rounds; bound: what no plan can undercut
    exact     the exact planner, which needs highspy; buckets: few lengths for many; offline: a tighter bound
    simulate  how long a packing takes, and how full ranks are
    auto      the simpler of two plans where it is enough
    stragglers  how fast each rank is, from what its steps took
    rivals    other schedulers, for comparison; compare: all of them in one table

Pure Python and NumPy: a plan needs no process group and no GPU.
"""
