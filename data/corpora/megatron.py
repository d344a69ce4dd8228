"""A corpus that is tokenised already, in Megatron-core's format: it is read where it lies, and never copied."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.corpora.files import PART_BYTES, CorpusPart, CorpusReader, is_there
from data.stores.indexed import TokenIndex

SAMPLE = 1000  # documents looked at for the token that closes them


class Megatron(CorpusReader):
    """The documents of PATH.bin and PATH.idx; a document's content is its tokens' bytes."""

    name = "megatron"

    def __init__(self, *, path: str | None = None) -> None:
        self.path = path
        self._index: TokenIndex | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_index": None}  # else pickling would copy it

    @property
    def prefix(self) -> Path:
        """The path without .bin or .idx."""
        path = Path(self.path or "").expanduser().absolute()
        if path.is_dir() and (path / "tokens.idx").exists():  # a store of ours
            path = path / "tokens"
        return path.with_suffix("") if path.suffix in (".bin", ".idx") else path

    @property
    def bin(self) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.bin")

    @property
    def idx(self) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.idx")

    @property
    def index(self) -> TokenIndex:
        if self._index is None:
            try:
                self._index = TokenIndex(self.idx)
            except ValueError as error:
                raise ValueError(f"data.path={self.path}: {error}") from None
        return self._index

    def check(self) -> None:
        """Raises ValueError unless both files are there and fit each other."""
        if not self.path:
            raise ValueError("data.path=null: corpus megatron needs the path of a .bin and .idx, without either")
        for file in (self.idx, self.bin):
            is_there("data.path", file)
            if not file.is_file():
                raise ValueError(f"data.path={self.path}: there is no {file.name} beside it")
        wanted, size = self.index.tokens * self.index.dtype.itemsize, self.bin.stat().st_size
        if size != wanted:
            raise ValueError(
                f"data.path={self.path}: {self.bin.name} has {size:,} bytes, its index {wanted:,}: truncated, or of "
                "another corpus"
            )
        if not self.index.tokens:
            raise self.nothing()

    def identity(self) -> dict[str, str | int]:
        """The resolved path, and both files' sizes and mtimes."""
        identity: dict[str, str | int] = {"corpus": self.name, "path": str(self.prefix.resolve())}
        for file in (self.bin, self.idx):
            stat = file.stat()
            identity |= {f"{file.suffix[1:]}_bytes": stat.st_size, f"{file.suffix[1:]}_mtime": stat.st_mtime_ns}
        return identity

    def parts(self) -> Iterator[CorpusPart]:
        """Ranges of documents."""
        try:
            self.index.check()
        except ValueError as error:
            raise ValueError(f"data.path={self.path}: {error}") from None
        count, itemsize = len(self.index.documents) - 1, self.index.dtype.itemsize
        first = begin = 0
        while first < count:
            low, high = first + 1, count  # the fewest documents that fill a part
            while low < high:
                middle = (low + high) // 2
                full = (self.index.offset(middle) - begin) * itemsize >= PART_BYTES
                low, high = (low, middle) if full else (middle + 1, high)
            end = self.index.offset(low)
            yield CorpusPart((first, low), (end - begin) * itemsize)
            first, begin = low, end

    def read(self, part: CorpusPart, skipped: Counter[str]) -> Iterator[tuple[str, bytes]]:
        """(name of the corpus, its tokens' bytes) of every document. Empty ones keep their place."""
        tokens = np.memmap(self.bin, dtype=self.index.dtype, mode="r")
        begin = self.index.offset(part.what[0])
        for document in range(*part.what):
            end = self.index.offset(document + 1)
            if begin == end:
                raise ValueError(f"data.path={self.path}: document {document} is empty")
            yield self.prefix.name, tokens[begin:end].tobytes()
            begin = end

    def closing(self) -> int | None:
        """The token that all documents end with, as far as a sample of them tells; None where they end differently."""
        index = self.index
        count = len(index.documents) - 1
        tokens = np.memmap(self.bin, dtype=index.dtype, mode="r")
        looked = range(0, count, max(count // SAMPLE, 1))
        last = {int(tokens[index.offset(document + 1) - 1]) for document in looked}
        return last.pop() if len(last) == 1 and count > 1 else None

    def nothing(self) -> ValueError:
        return ValueError(f"data.path={self.path}: holds no documents")
