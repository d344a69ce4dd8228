"""Sequence parallelism: a packed sequence over ranks, and the transports that join its spans."""

from parallel.sequence.attention import GatherKeys
from parallel.sequence.recurrence import GatherEffects

TRANSPORTS: dict[str, dict[str, type]] = {
    "recurrence": {"gather": GatherEffects},
    "attention": {"gather": GatherKeys},
}
