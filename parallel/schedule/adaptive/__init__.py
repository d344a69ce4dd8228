"""Adaptive groups: every batch gets the sequence-parallel groups that suit its lengths. Pure Python and NumPy.

cost        what a micro-step costs, from layers, wires and memory     profiles  published models and clusters
packing     which sequences run where in one step                      simulate  how long that takes, how full ranks are
planner     the fast planner, improve its rounds, bound its bound      rivals    other schedulers, for comparison
    exact       the exact planner, which needs highspy                     buckets   few lengths for many
"""
