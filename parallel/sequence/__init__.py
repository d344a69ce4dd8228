"""Sequence parallelism: a packed sequence over ranks, and the transports that join its spans."""

from parallel.sequence.effects import AllScan, Auto, GatherEffects, Relay
from parallel.sequence.keys import GatherKeys, MeshKeys, Ring, Ulysses

TRANSPORTS: dict[str, dict[str, type]] = {
    "recurrence": {"allscan": AllScan, "auto": Auto, "gather": GatherEffects, "relay": Relay},
    "attention": {"gather": GatherKeys, "ring": Ring, "ulysses": Ulysses, "usp": MeshKeys},
}
