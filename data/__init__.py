"""Which tokens a run trains on, as a pure function of (seed, step).

A corpus yields documents, a tokenizer makes ids of them, a store keeps the ids on disk, packing cuts windows from the
store, and the loader makes batches of windows. NumPy only: nothing here imports torch or another room of farspan.
"""
