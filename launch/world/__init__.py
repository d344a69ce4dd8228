"""The processes of one torch.distributed world, and the watch over them."""
