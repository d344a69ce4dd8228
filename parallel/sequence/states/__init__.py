"""Transports of effects: how the state that enters a span reaches it. Each serves every recurrence."""

from parallel.sequence.states.all_gather import GatherEffects
from parallel.sequence.states.auto import AutoTransport
from parallel.sequence.states.relay import AllScan, Relay
from parallel.sequence.states.transport import Transport, cross

__all__ = ["AllScan", "AutoTransport", "GatherEffects", "Relay", "Transport", "cross"]
