"""Transports of effects: how the state that enters a span reaches it. Each serves every recurrence."""

from parallel.sequence.effects.auto import Auto
from parallel.sequence.effects.crossing import Transport, cross
from parallel.sequence.effects.gather import GatherEffects
from parallel.sequence.effects.relay import AllScan, Relay

__all__ = ["AllScan", "Auto", "GatherEffects", "Relay", "Transport", "cross"]
