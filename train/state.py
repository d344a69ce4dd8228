"""What a run remembers across steps, besides its tensors."""

from dataclasses import asdict, dataclass


@dataclass
class State:
    """step: optimizer steps done. tokens: trained on. skips: batches passed over. attempt: starts of this run."""

    step: int = 0
    tokens: int = 0
    skips: int = 0
    attempt: int = 1

    def facts(self) -> dict[str, int]:
        return asdict(self)
