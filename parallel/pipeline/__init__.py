"""Pipeline parallelism: layers cut into stages on ranks of their own, and micro-steps that pass through them."""
