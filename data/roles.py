"""The tokens that are no text: what stands before a document, behind it, in empty places, and what ends a text."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Roles:
    """begin: in front of every document and every prompt; () where nothing is. end: behind every document, as a target;
    None where nothing is. stop: the ids that end a text that is written. pad: what fills empty places, unknown: what
    stands for text that no token spells; None where there is none.

    Where one token is both `begin` and `end` (`joint`), as that of our own tokenizers is, it stands once between two
    documents: it opens the second, and is the last target of the first.
    """

    begin: tuple[int, ...] = ()
    end: int | None = None
    stop: tuple[int, ...] = ()
    pad: int | None = None
    unknown: int | None = None

    @classmethod
    def of(cls, token: int) -> "Roles":
        """One token for everything."""
        return cls((token,), token, (token,))

    @classmethod
    def from_card(cls, card: dict[str, Any]) -> "Roles":
        """Raises KeyError or TypeError for a card that is not whole."""
        if "document" in card:
            return cls.of(card["document"])
        return cls(tuple(card["begin"]), card["end"], tuple(card["stop"]), card["pad"], card["unknown"])

    def card(self) -> dict[str, Any]:
        roles = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in roles.items()}

    @property
    def joint(self) -> bool:
        return self.begin == (self.end,)

    @property
    def closing(self) -> tuple[int, ...]:
        """The tokens that close a document, by its own tokenizer."""
        return () if self.joint or self.end is None else (self.end,)

    @property
    def marks(self) -> frozenset[int]:
        """The ids of documents that are not their text."""
        return frozenset((*self.begin, *(() if self.end is None else (self.end,))))

    @property
    def entry(self) -> tuple[int, ...]:
        """The tokens to read a text behind where there must be some: its begin, else the end of another; () without
        both."""
        return self.begin or self.closing

    @property
    def fill(self) -> int:
        """The id of places that hold no document."""
        return next(i for i in (self.end if self.joint else self.pad, self.end, *self.begin, 0) if i is not None)


def roles_of(tokenizer: Any) -> Roles:
    """The roles of a tokenizer's special tokens; a tokenizer that names a `DOCUMENT` alone uses it for all of them."""
    roles = getattr(tokenizer, "roles", None)
    return Roles.of(tokenizer.DOCUMENT) if roles is None else roles
