"""The memory of a run across steps, besides its tensors."""

from dataclasses import asdict, dataclass, field
from typing import Any

from train.settings import TrainSettings


@dataclass
class State:
    """step: optimizer steps done. tokens: trained on. places: the same with padding. skips: batches passed over.
    attempt: starts of this run, and times that it went back. skipped: [begin, end) of each row of batches passed over,
    by their place in the order, which is step + skips; there are `skips` of them. rollbacks: how often the run went
    back. since: the place where it last did. scale: of the learning rate, since then. padding: of all batches before
    the next, by the source that it stands beside."""

    step: int = 0
    tokens: int = 0
    places: int = 0
    skips: int = 0
    attempt: int = 1
    skipped: list[list[int]] = field(default_factory=list)
    rollbacks: int = 0
    since: int = 0
    scale: float = 1.0
    padding: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, facts: dict[str, Any]) -> "State":
        """Reads a checkpoint's manifest; one from before there were guards has passed over nothing, and in one from
        before
        padding could be told it is among the tokens."""
        facts = {"places": facts.get("tokens", 0), **facts}
        names = ("step", "tokens", "places", "skips", "attempt", "skipped", "rollbacks", "since", "scale", "padding")
        return cls(**{name: facts[name] for name in names if name in facts})

    @property
    def place(self) -> int:
        """The number of the next batch in the order."""
        return self.step + self.skips

    def skip(self, end: int) -> None:
        """Passes over the batches from the next one up to `end`."""
        begin = self.place
        if self.skipped and self.skipped[-1][1] == begin:
            self.skipped[-1] = [self.skipped[-1][0], end]
        else:
            self.skipped.append([begin, end])
        self.skips += end - begin

    def facts(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class TrainProgress:
    """The progress of a run through its budget; the loop moves it, and everything else reads it.

    state: what checkpoints keep of it. tokens: those of the last step, 0 for one that was skipped. stopping: a stop was
    asked for in the last step.
    """

    settings: TrainSettings
    state: State
    tokens: int = 0
    stopping: bool = False

    @property
    def complete(self) -> bool:
        return self.settings.complete(self.state.step, self.state.tokens)

    @property
    def ended(self) -> bool:
        return self.stopping or self.complete

    def stepped(self, tokens: int, places: int) -> None:
        """Counts an optimizer step over so many tokens, in so many places."""
        self.tokens = tokens
        self.state.step += 1
        self.state.tokens += tokens
        self.state.places += places

    def skipped(self) -> None:
        """Counts a step that was held back: its batch is passed over."""
        self.tokens = 0
        self.state.skip(self.state.place + 1)

    def due(self, every: int | None) -> bool:
        """Returns whether the last step crossed a multiple of `every` tokens."""
        before = self.state.tokens - self.tokens
        return every is not None and self.state.tokens // every > before // every

    def middle(self, tokens: int, places: int) -> float:
        """Returns where the middle of the next step stands in the budget: in tokens, or in places where that is of
        steps."""
        by_steps = self.settings.steps is not None
        return self.state.places + places / 2 if by_steps else self.state.tokens + tokens / 2
