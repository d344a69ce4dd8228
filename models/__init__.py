"""What is computed, as if one device held everything. Nothing here knows a rank or imports torch.distributed."""
