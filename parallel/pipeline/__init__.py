"""Pipeline parallelism: layers cut into stages on ranks of their own, and micro-steps that pass through them."""

from parallel.pipeline.division import Division
from parallel.pipeline.orders import bubble
from parallel.pipeline.runner import Pipeline, check

__all__ = ["Division", "Pipeline", "bubble", "check"]
