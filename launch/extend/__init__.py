"""A trained model's context made longer, in stages: a chain of runs, each from the one before."""
