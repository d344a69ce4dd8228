"""Text that grows by a token's bytes at a time: whole characters as soon as they are there, and an end at a stop."""

from codecs import getincrementaldecoder
from collections.abc import Sequence


class StreamedText:
    """The part of a continuation that may be shown so far.

    `add` takes the bytes of the next token and returns the characters that are certain: a character may take several
    tokens, and what may become one of the `stop` strings waits until it is one or is not. `ended`: a stop has come, the
    text is cut where it starts, and nothing follows. Of several, the first that is complete counts, of those that are
    complete at once the one that starts first, so that the same text ends at the same place however it is cut into
    tokens. Bytes that are no UTF-8 show as U+FFFD.
    """

    def __init__(self, stop: Sequence[str] = ()):
        self.stop = tuple(stop)
        self.ended = False
        self._characters = getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def add(self, piece: bytes) -> str:
        return self._shown(self._characters.decode(piece), at_end=False)

    def close(self) -> str:
        """Returns what was held back; the text ends here."""
        return self._shown(self._characters.decode(b"", True), at_end=True)

    def _shown(self, more: str, *, at_end: bool) -> str:
        if self.ended:
            return ""
        text = self._held + more
        ends = [(at + len(each), at) for each in self.stop if (at := text.find(each)) >= 0]
        if ends:
            self.ended, self._held = True, ""
            return text[: min(ends)[1]]
        shown = len(text) if at_end else len(text) - self._waiting(text)
        self._held = text[shown:]
        return text[:shown]

    def _waiting(self, text: str) -> int:
        """Returns how many characters at the end may be the beginning of a stop."""
        longest = max((len(each) for each in self.stop), default=1) - 1
        for count in range(min(longest, len(text)), 0, -1):
            if any(each.startswith(text[-count:]) for each in self.stop):
                return count
        return 0
