"""Generated documents that teach a long context: a needle in a haystack, and a passage that is said again.

Document n of a seed is a pure function of (seed, n) and of the standard library's source, whatever the number of
documents and whoever reads them. Its hay is that source, of those files alone that no split holds out: a document is
held out if its hash, as a fraction of 2^64, is below data.heldout, and hay is of files whose hash is at least `SAFE`.
So no text that is held out of a corpus beside it, as of data=stdlib, is ever in a generated document, and a larger
data.heldout is refused. The files are plain ASCII: a cut anywhere is text to every tokenizer.
"""

import math
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from data.corpora.files import PART_BYTES, CorpusPart, CorpusReader, hashed
from data.corpora.installed import Stdlib
from data.tasks import Draw

SAFE = 0.25  # a split holds at most so much out
DOCUMENTS, LENGTHS = 10_000, (256, 4096)  # where none are asked for
NEEDLES, COPIES = 0, 1  # what the draws are keyed by, under the seed

KEY = "\nThe pass key is {0}. Remember it: {0} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
AGAIN = "\nThe same text, once more:\n"


@lru_cache(maxsize=1)
def hay(root: Path) -> bytes:
    """The standard library's files that may be hay, in the order of their hashes, end to end: some 18 MB."""
    library = Stdlib()
    library.root = root
    texts = {hashed(content): content for _, content in library if content.isascii() and b"\0" not in content}
    safe = [content for key, content in sorted(texts.items()) if key >= SAFE * 2**64]
    return b"".join(content if content.endswith(b"\n") else content + b"\n" for content in safe)


class Generated(CorpusReader):
    """Documents of generated text.

    documents: how many; null for 10,000. A larger number only adds some. lengths: [least, most] tokens of a document,
    byte by byte and with the mark that opens it, as `farspan evaluate` counts; they are spread evenly over the
    logarithm; null for [256, 4096]. seed: another is other documents.
    """

    kind = 0
    least = 1  # tokens that a document needs

    def __init__(
        self,
        *,
        path: str | None = None,
        documents: int | None = None,
        lengths: list[int] | None = None,
        seed: int = 0,
    ) -> None:
        self.path = path
        self.documents = DOCUMENTS if documents is None else documents
        self.lengths = list(LENGTHS) if lengths is None else lengths
        self.seed = seed
        self.root = Stdlib().root

    def check(self) -> None:
        """Raises ValueError if a path is given, a number is out of range, or this Python has no source on disk."""
        if self.path is not None:
            raise ValueError(f"data.path={self.path}: corpus {self.name} takes no path: it is generated")
        for key, number, least in (("documents", self.documents, 1), ("seed", self.seed, 0)):
            if not _whole(number) or number < least:
                raise ValueError(f"data.{key}={number}: must be a whole number from {least}")
        at = f"data.lengths={self.lengths}"
        if not isinstance(self.lengths, list | tuple) or len(self.lengths) != 2 or not all(map(_whole, self.lengths)):
            raise ValueError(f"{at}: must be two whole numbers, [least, most]")
        least, most = self.lengths
        if least > most:
            raise ValueError(f"{at}: must be in order; nearest [{most}, {least}]")
        if least < self.least:
            raise ValueError(f"{at}: must begin with at least {self.least}, the room that corpus {self.name} needs")
        if next(Stdlib().walk(), None) is None:
            raise ValueError(f"data.corpus={self.name}: needs the standard library's source, which is not here")

    def identity(self) -> dict[str, str | int]:
        """The parameters, the version of what is drawn, and the standard library's identity."""
        identity: dict[str, str | int] = {"corpus": self.name, "version": 1}
        identity |= {"documents": self.documents, "seed": self.seed}
        least, most = self.lengths
        library = {f"hay {key}": value for key, value in Stdlib().identity().items()}
        return {**identity, "least": least, "most": most, **library}

    def parts(self) -> Iterator[CorpusPart]:
        """Ranges of numbers of documents."""
        least, most = self.lengths
        mean = (most - least) / math.log(most / least) if most > least else least
        step = max(int(PART_BYTES / mean), 1)
        for begin in range(0, self.documents, step):
            end = min(begin + step, self.documents)
            yield CorpusPart((begin, end), int(mean * (end - begin)))

    def read(self, part: CorpusPart, skipped: Counter[str]) -> Iterator[tuple[str, bytes]]:
        """(name of the corpus, text) of every number in the range."""
        for number in range(*part.what):
            yield self.name, self.document(number)

    def document(self, number: int) -> bytes:
        """The text of a document: as many bytes as it has tokens, less the mark."""
        draw = Draw(self.seed, self.kind, number)
        least, most = self.lengths
        length = int(least * ((most + 1) / least) ** (draw.below(2**53, 1)[0] / 2**53))
        return self.text(draw, min(length, most) - 1)

    def text(self, draw: Draw, size: int) -> bytes:
        """A document of `size` bytes."""
        raise NotImplementedError

    def straw(self, draw: Draw, size: int, *, from_line: bool = False) -> bytes:
        """So many bytes of hay, from anywhere in it, or from the begin of any line; from its own begin again where all
        of it is shorter."""
        text = hay(self.root)
        if len(text) < size:
            text *= -(-size // len(text))
        begin = int(draw.below(len(text) - size + 1, 1)[0])
        if from_line:
            begin = text.rfind(b"\n", 0, begin) + 1
        return text[begin : begin + size]


class Needles(Generated):
    """Passkey retrieval (2305.16300, section 4.2), in the words and in the form of `farspan evaluate`: hay with a
    sentence that tells a number, anywhere in it with the same odds, then the question, and the number.

    The number is any of five digits, as evaluation's is: what differs is the hay, and the draw that both come from.
    """

    name = "needles"
    kind = NEEDLES
    least = 1 + len(KEY.format(10_000)) + len(f"{QUESTION} 10000")

    def text(self, draw: Draw, size: int) -> bytes:
        number = 10_000 + int(draw.below(90_000, 1)[0])
        needle, question = KEY.format(number).encode(), f"{QUESTION} {number}".encode()
        room = size - len(needle) - len(question)
        straw, at = self.straw(draw, room), int(draw.below(room + 1, 1)[0])
        return b"".join((straw[:at], needle, straw[at:], question))


class Copies(Generated):
    """A passage that begins with a line, a line that announces it again, and the same passage: half of the tokens are
    told by those that stood half a document before, where induction heads look (2209.11895).

    A byte that is left over ends the last line.
    """

    name = "copies"
    kind = COPIES
    least = 1 + 2 * 16 + len(AGAIN)  # a shorter passage is hardly one

    def text(self, draw: Draw, size: int) -> bytes:
        half, left = divmod(size - len(AGAIN), 2)
        passage = self.straw(draw, half, from_line=True)
        return b"".join((passage, AGAIN.encode(), passage, b"\n" * left))


def _whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)
