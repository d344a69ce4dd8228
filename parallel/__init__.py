"""The placement of each part of the computation. Knows sequences, recurrences and dispatch; never a concrete mixer."""
