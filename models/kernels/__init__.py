"""Kernels in plain PyTorch, the reference on every device and what a CPU runs; `registry` knows of others."""
