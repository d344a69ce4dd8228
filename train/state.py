"""What a run remembers across steps, besides its tensors."""

from dataclasses import asdict, dataclass, field
from typing import Any


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
        """Of a checkpoint's manifest; one from before there were guards has passed over nothing, and in one from before
        padding could be told it is among the tokens."""
        facts = {"places": facts.get("tokens", 0), **facts}
        names = ("step", "tokens", "places", "skips", "attempt", "skipped", "rollbacks", "since", "scale", "padding")
        return cls(**{name: facts[name] for name in names if name in facts})

    @property
    def place(self) -> int:
        """Of the next batch in the order."""
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
