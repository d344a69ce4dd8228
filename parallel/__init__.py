"""Where each part of the computation happens. Knows sequences, recurrences and dispatch; never a concrete mixer."""
