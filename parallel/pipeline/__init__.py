"""Pipeline parallelism: layers cut into stages on ranks of their own, and micro-steps that pass through them."""

from parallel.pipeline.cut import PipelineCut
from parallel.pipeline.orders import bubble, orders
from parallel.pipeline.runner import Pipeline, check

__all__ = ["Pipeline", "PipelineCut", "bubble", "check", "orders"]
