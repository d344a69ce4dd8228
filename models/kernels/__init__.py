"""Chunked kernels in plain PyTorch: the reference on every device, and what the CPU runs."""
