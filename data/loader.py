"""One corpus, as a run reads it."""

from pathlib import Path

from data.batches import Batches, Sequencing, TooLong, checked_audit
from data.corpora.corpus import CorpusName
from data.corpora.files import OnError
from data.curriculum import Curriculum
from data.samplers import PackingName
from data.samplers.decompose import Overlong
from data.samplers.sampler import Source
from data.stores.parts import Runner
from data.stores.prepare import Watch
from data.stores.settings import Storing
from data.stores.store import Store


class Data:
    """A corpus, its tokenizer, its store, and the rules by which it becomes sequences.

    corpus: source of documents: stdlib (the source of Python's own standard library), text (UTF-8 files), jsonl,
    parquet, hf (Hugging Face datasets), megatron (tokens in Megatron-core's format, used in place), store (a store that
    exists already), headers (PyTorch's C++ headers), needles (generated: a number in a haystack, asked for at the end)
    or copies (generated: a passage, said again). path: the file of a corpus, or its folder; of records also a pattern
    (`shards/*.jsonl`); of hf also a dataset's name; of megatron the path without .bin; null for the others. field: the
    field, or column, that holds a record's text. subset: subset of a Hugging Face dataset that has several. split:
    split of a Hugging Face dataset: train, test and so on. streaming: true reads a Hugging Face dataset from the
    network as it goes, and stores only tokens. on_error: at a record that is no text, stop, or skip, which leaves it
    out and counts it in the card. documents: number of documents of needles and copies; null for 10,000. A larger
    number only adds some. lengths: [least, most] bytes of a document of needles and copies, with the token that opens
    it: evenly spread over the logarithm; null for [256, 4096]. seed: seed of needles and copies; another seed gives
    other documents. tokenizer: bytes; bpe, trained on the corpus; a tokenizer.json, or a folder with one; of megatron
    also ids, tokens without a spelling. vocabulary: tokens that a bpe may have (8192 if null), or that ids have (as
    many as occur). document: the token of a tokenizer.json that stands behind documents; null for the one that its
    folder ends texts with. store: the folder of the token store; null for one in the user's cache, named by the corpus
    and its identity; of corpus store, also an address that fsspec understands. local: a folder on each machine's own
    disk to which the store is copied once; null to read it in place. workers: processes that tokenise; null for one a
    core. max_length: tokens in a sequence, at most. packing: concat lays documents end to end and cuts; best_fit leaves
    documents that fit whole, and pads; decomposition splits documents into powers of two (2405.13226). min_length:
    tokens of the shortest bucket of a decomposition. overlong: pieces of a document above twice max_length in a
    decomposition, random or longest first. too_long: use of documents of more than max_length tokens: split cuts them,
    skip leaves them out of training and counts them, error refuses them. document_mask: true hides from each token the
    documents before its own.
    heldout: the fraction of documents, in (0, 1), that is never trained on; of very few documents, where all would be
    on one side, the end of the longest; at most 0.25 of needles and copies. heldout_tokens: tokens of these that an
    evaluation reads. audit: steps over which `farspan plan` proves that no token is lost or seen twice, reading every
    part of the store; null for none. Raises ValueError, one line that opens with the key, for a value out of range.
    """

    def __init__(
        self,
        *,
        corpus: CorpusName | None,
        path: str | None = None,
        field: str = "text",
        subset: str | None = None,
        split: str = "train",
        streaming: bool = False,
        on_error: OnError = "stop",
        documents: int | None = None,
        lengths: list[int] | None = None,
        seed: int = 0,
        tokenizer: str = "bytes",
        vocabulary: int | None = None,
        document: str | None = None,
        store: str | None = None,
        local: str | None = None,
        workers: int | None = None,
        max_length: int = 4096,
        packing: PackingName = "concat",
        min_length: int = 256,
        overlong: Overlong = "random",
        too_long: TooLong = "split",
        document_mask: bool = True,
        heldout: float = 0.03,
        heldout_tokens: int = 65536,
        audit: int | None = None,
    ) -> None:
        self.storing = Storing(
            corpus=corpus,
            path=path,
            field=field,
            subset=subset,
            split=split,
            streaming=streaming,
            on_error=on_error,
            documents=documents,
            lengths=lengths,
            seed=seed,
            tokenizer=tokenizer,
            vocabulary=vocabulary,
            document=document,
            store=store,
            local=local,
            workers=workers,
        )
        self.sequencing = Sequencing(
            max_length=max_length,
            packing=packing,
            min_length=min_length,
            overlong=overlong,
            too_long=too_long,
            document_mask=document_mask,
            heldout=heldout,
            heldout_tokens=heldout_tokens,
        )
        self.audit = checked_audit(audit)
        self.check = self.storing.check
        self.check_heldout = self.storing.check_heldout
        self.check_heldout(self.sequencing.heldout)
        self.vocabulary_size = self.storing.vocabulary_size
        self.left_out = self.storing.left_out

    def prepare(self, runner: Runner | None = None, watch: Watch | None = None) -> Path:
        """Builds the token store, or finds it built, and returns its folder (`Storing.prepare`)."""
        return self.storing.prepare(runner, watch)

    def open(self, batch_tokens: int, curriculum: Curriculum | None = None) -> Batches:
        """The batches of `batch_tokens` tokens each, over the store (built if it is not there)."""
        store = Store(self.prepare())
        return Batches(
            [Source("", store)],
            tokenizer=store.tokenizer,
            batch_tokens=batch_tokens,
            sequencing=self.sequencing,
            curriculum=curriculum,
        )
