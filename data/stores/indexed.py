"""Megatron-core's IndexedDataset, by its public layout: NAME.bin and NAME.idx, all little-endian.

    .bin    the tokens of all sequences, end to end
    .idx    9 bytes   b"MMIDIDX\\0\\0"
            uint64    version, 1
            uint8     code of the tokens' type: 1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16
            uint64    number of sequences, S
            uint64    number of document indices, D: one more than there are documents
            int32     [S] tokens of each sequence
            int64     [S] where each begins in .bin, in bytes
            int64     [D] the sequence that each document begins with; the last is S

A document may have several sequences; those that farspan writes have one. (Multimodal datasets carry int8 [S] modes
behind that; they are not read.)
"""

import struct
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
CODES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats: no tokens
BLOCK = 1 << 20  # entries handled at a time
_HEAD = struct.Struct("<9sQBQQ")


def smallest(size: int) -> np.dtype:
    """The type of tokens that Megatron takes for a vocabulary of `size`."""
    return np.dtype("<u2" if size < 65500 else "<i4")


class TokenIndex:
    """An .idx file, memory-mapped: `dtype` of the tokens, `lengths` int32 [S], `pointers` int64 [S] in bytes, and
    `documents` int64 [D].

    Raises ValueError, without a key, for a file that is none or is cut short; OSError where it cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        with open(path, "rb") as stream:
            head = stream.read(_HEAD.size)
        if len(head) < _HEAD.size or not head.startswith(MAGIC):
            raise ValueError(f"{path} is no index of Megatron's")
        _, version, code, sequences, documents = _HEAD.unpack(head)
        if version != VERSION:
            raise ValueError(f"{path} is of version {version}, expected {VERSION}")
        if code not in CODES:
            raise ValueError(f"{path} is of type {code}, which holds no tokens")
        self.dtype = np.dtype(CODES[code])
        wanted = _HEAD.size + 12 * sequences + 8 * documents
        if documents < 1 or Path(path).stat().st_size < wanted:
            raise ValueError(f"{path} is cut short: expected {wanted:,} bytes")
        data = np.memmap(path, mode="r")
        ends = np.cumsum([_HEAD.size, 4 * sequences, 8 * sequences, 8 * documents])
        self.lengths: NDArray[np.int32] = data[ends[0] : ends[1]].view("<i4")
        self.pointers: NDArray[np.int64] = data[ends[1] : ends[2]].view("<i8")
        self.documents: NDArray[np.int64] = data[ends[2] : ends[3]].view("<i8")

    @property
    def tokens(self) -> int:
        """The number of tokens that the .bin file must hold."""
        return int(self.pointers[-1]) // self.dtype.itemsize + int(self.lengths[-1]) if len(self.lengths) else 0

    def offset(self, document: int) -> int:
        """The first token of a document; for the number of documents, the end of the last."""
        sequence = int(self.documents[document])
        return int(self.pointers[sequence]) // self.dtype.itemsize if sequence < len(self.pointers) else self.tokens

    def check(self) -> None:
        """Reads all of it. Raises ValueError unless sequences lie end to end, and documents are made of them."""
        end = 0
        for begin in range(0, len(self.lengths), BLOCK):
            lengths = self.lengths[begin : begin + BLOCK].astype(np.int64)
            edges = end + np.concatenate([[0], np.cumsum(lengths)]) * self.dtype.itemsize
            if (lengths < 0).any() or not np.array_equal(edges[:-1], self.pointers[begin : begin + BLOCK]):
                raise ValueError("its index has sequences that do not lie end to end")
            end = int(edges[-1])
        inside = self.documents[0] == 0 and self.documents[-1] == len(self.lengths)
        if not inside or any(
            (np.diff(self.documents[begin : begin + BLOCK + 1]) < 0).any()
            for begin in range(0, len(self.documents), BLOCK)
        ):
            raise ValueError("its index has documents that are not made of its sequences")


def write_index(path: str | Path, offsets: NDArray[np.int64], dtype: DTypeLike) -> None:
    """Writes the .idx file of documents of one sequence each, in blocks.

    offsets: int64 [N + 1], in tokens: document i is tokens[offsets[i]:offsets[i + 1]]. Raises ValueError for a document
    of 2^31 tokens or more.
    """
    count, itemsize = len(offsets) - 1, np.dtype(dtype).itemsize
    code = next(code for code, known in CODES.items() if np.dtype(known) == np.dtype(dtype))
    blocks = range(0, count, BLOCK)
    with open(path, "wb") as stream:
        stream.write(_HEAD.pack(MAGIC, VERSION, code, count, count + 1))
        for begin in blocks:
            lengths = np.diff(offsets[begin : min(begin + BLOCK, count) + 1])
            if lengths.max(initial=0) >= 2**31:
                raise ValueError(f"a document has {lengths.max():,} tokens; must be below 2^31, Megatron's limit")
            stream.write(lengths.astype("<i4").tobytes())
        for begin in blocks:
            pointers = np.asarray(offsets[begin : min(begin + BLOCK, count)], dtype="<i8") * itemsize
            stream.write(pointers.tobytes())
        for begin in range(0, count + 1, BLOCK):
            stream.write(np.arange(begin, min(begin + BLOCK, count + 1), dtype="<i8").tobytes())
