"""Sequence parallelism: a packed sequence over ranks, and the transports that join its spans."""

from parallel.sequence.attention import GatherKeys, MeshKeys, Ring, Ulysses
from parallel.sequence.states import AllScan, AutoTransport, GatherEffects, Relay

TRANSPORTS: dict[str, dict[str, type]] = {
    "recurrence": {"allscan": AllScan, "auto": AutoTransport, "gather": GatherEffects, "relay": Relay},
    "attention": {"gather": GatherKeys, "ring": Ring, "ulysses": Ulysses, "usp": MeshKeys},
}
