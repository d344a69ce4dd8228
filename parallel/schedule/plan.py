"""A Plan: what every rank does in one step. It is data: it can be printed, checked, logged and replayed.

A step's global batch is a list of packed sequences. A plan runs all of them in micro-steps; in each the ranks are
partitioned into groups, a group holds some of the sequences, joined end to end, and each rank its spans of that.
"""

from dataclasses import dataclass

Span = tuple[int, int]


@dataclass(frozen=True)
class Group:
    """`sequences` (indices into the batch), joined in order, over `ranks`; `spans[i]`, [begin, end), are ranks[i]'s.

    A rank with no span, or a group with no sequence, is idle: it runs one masked token so that every collective has it.
    The order in which ranks are listed, and the spans of a rank, means nothing: both are kept ascending, as process
    groups number their ranks and as chains are walked. recompute: whether the backward pass computes layers again,
    which engine.recompute=planned leaves to the plan.
    """

    ranks: tuple[int, ...]
    sequences: tuple[int, ...]
    spans: tuple[tuple[Span, ...], ...]
    recompute: bool = False

    def __post_init__(self) -> None:
        if len(self.ranks) == len(self.spans):
            held = sorted(zip(self.ranks, (tuple(sorted(own)) for own in self.spans), strict=True))
            object.__setattr__(self, "ranks", tuple(rank for rank, _ in held))
            object.__setattr__(self, "spans", tuple(own for _, own in held))


@dataclass(frozen=True)
class MicroStep:
    """A partition of all ranks into groups."""

    groups: tuple[Group, ...]

    def group_of(self, rank: int) -> Group:
        return next(group for group in self.groups if rank in group.ranks)


@dataclass(frozen=True)
class Plan:
    """The micro-steps of one step over a batch of sequences of `lengths` tokens."""

    step: int
    lengths: tuple[int, ...]
    micro_steps: tuple[MicroStep, ...]

    def check(self, world: int) -> None:
        """Raises ValueError unless this is all that the executor asks of a plan: every sequence has tokens and runs
        once, whole; each micro-step has every rank in one group; the spans of a rank in a micro-step are equal."""
        if not self.micro_steps or not self.lengths or min(self.lengths) < 1:
            raise ValueError(
                f"a plan needs a micro-step and a sequence, and every sequence a token: {len(self.micro_steps)} "
                f"micro-steps, sequences of {list(self.lengths)} tokens"
            )
        for m, micro in enumerate(self.micro_steps):
            if sorted(r for group in micro.groups for r in group.ranks) != list(range(world)):
                raise ValueError(f"micro-step {m}: its groups do not partition the {world} ranks")
            for group in micro.groups:
                if len(group.spans) != len(group.ranks):
                    raise ValueError(f"micro-step {m}, ranks {group.ranks}: {len(group.spans)} lists of spans")
                if wrong := [s for s in group.sequences if not 0 <= s < len(self.lengths)]:
                    raise ValueError(f"the plan runs sequences {wrong}, the batch has {len(self.lengths)}")
                for rank, held in zip(group.ranks, group.spans, strict=True):
                    if len({end - begin for begin, end in held}) > 1:
                        raise ValueError(f"micro-step {m}, rank {rank}: its spans {list(held)} differ in length")
                total, at = sum(self.lengths[s] for s in group.sequences), 0
                for begin, end in sorted(span for held in group.spans for span in held):
                    if begin != at or end <= begin:
                        raise ValueError(f"micro-step {m}, ranks {group.ranks}: spans leave or repeat tokens at {at}")
                    at = end
                if at != total:
                    raise ValueError(f"micro-step {m}, ranks {group.ranks}: spans cover {at} of {total} tokens")
        run = sorted(s for micro in self.micro_steps for group in micro.groups for s in group.sequences)
        if run != list(range(len(self.lengths))):
            raise ValueError(f"the plan runs sequences {run}, the batch has {len(self.lengths)}")

    def text(self) -> str:
        """The plan for people, a line a group."""
        lines = [f"step {self.step}: {len(self.lengths)} sequences, {sum(self.lengths):,} tokens"]
        for m, micro in enumerate(self.micro_steps):
            lines.append(f"  micro-step {m}")
            for group in micro.groups:
                held = "  ".join(
                    f"rank {rank}: " + (" ".join(f"[{b:,}, {e:,})" for b, e in spans) or "idle")
                    for rank, spans in zip(group.ranks, group.spans, strict=True)
                )
                names = ", ".join(f"#{s} ({self.lengths[s]:,})" for s in group.sequences) or "nothing"
                lines.append(f"    {names} on {held}" + (", computed again" if group.recompute else ""))
        return "\n".join(lines)
