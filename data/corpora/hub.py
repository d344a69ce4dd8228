"""A corpus of Hugging Face `datasets`: a folder that it saved, files that it reads, or a dataset of the hub."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.corpora.files import OURS, PART_BYTES, CorpusPart, files, guarded, is_there
from data.corpora.outputs import is_inside
from data.corpora.records import ROWS, Records

# What `datasets` reads a local file with, by its suffix; a packed one has another suffix behind that.
BUILDERS = {
    **{".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".pq": "parquet"},
    **{".csv": "csv", ".tsv": "csv", ".txt": "text", ".arrow": "arrow"},
}
PACKED = (".gz", ".bz2", ".xz", ".zst")


class HuggingFace(Records):
    """One document a row.

    path: a folder that `datasets` saved, a file or a folder of files that it reads, neither of which asks the hub, or
    the name of a dataset there.

    A dataset on disk is read in ranges of rows, a streamed one in the shards that it comes in. No code that a dataset
    brings is run: `datasets` has not done that since version 4, and an earlier one is refused.
    """

    name = "hf"

    def __init__(
        self,
        *,
        path: str | None = None,
        field: str = "text",
        on_error: str = "stop",
        subset: str | None = None,
        split: str = "train",
        streaming: bool = False,
    ) -> None:
        super().__init__(path=path, field=field, on_error=on_error)
        self.subset = subset
        self.split = split
        self.streaming = streaming
        self._opened: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}  # every process opens it by itself

    def check(self) -> None:
        """Raises ValueError if the dataset cannot be opened, or has no such split or field."""
        if not self.path:
            raise ValueError("data.path=null: corpus hf needs a file, a folder or the name of a dataset")
        is_there("data.path", Path(self.path).expanduser())
        columns = self._dataset().column_names  # of a stream, None until it is read
        if columns is not None and (times := columns.count(self.field)) != 1:
            has = "no such column" if not times else f"{times} columns of that name"
            raise ValueError(f"data.field={self.field}: the dataset has {has}; it has {', '.join(columns)}")

    def left_out(self) -> dict[str, int]:
        """Nothing: `datasets` says which files are its own."""
        return {}

    def identity(self) -> dict[str, str | int]:
        """Path, subset, split and field; on disk also the number of rows, and its files by size and mtime."""
        identity: dict[str, str | int] = {"corpus": self.name, "path": str(self.path), "subset": str(self.subset)}
        identity |= {"split": self.split, "field": self.field, "on_error": self.on_error}
        identity["streaming"] = int(self.streaming)
        opened = self._dataset()
        if not self.streaming:
            stats = [Path(file["filename"]).stat() for file in opened.cache_files]
            digest = hashlib.sha256(repr([(s.st_size, s.st_mtime_ns) for s in stats]).encode()).hexdigest()
            identity |= {"rows": len(opened), "digest": digest}
        return identity

    def parts(self) -> Iterator[CorpusPart]:
        """Ranges of rows, or shards of a stream, whose size is not known before they are read."""
        opened = self._dataset()
        if self.streaming:
            for shard in range(opened.num_shards):
                yield CorpusPart((shard, opened.num_shards), 0)
            return
        rows, size = len(opened), opened.data.nbytes
        step = max(rows * PART_BYTES // max(size, 1), 1)
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            yield CorpusPart((begin, end), size * (end - begin) // rows)

    def read(self, part: CorpusPart, skipped: Counter[str]) -> Iterator[tuple[str, bytes]]:
        """(path of the dataset, text) of every row."""
        opened, first = self._dataset(), part.what[0]
        if self.streaming:
            shard, first = first, 0
            rows = opened.shard(num_shards=part.what[1], index=shard)
        else:
            rows = opened.select_columns([self.field]).select(range(*part.what))
        of = f" of shard {shard}" if self.streaming else ""
        for batch in guarded(rows.iter(batch_size=ROWS), f"data.path={self.path}: cannot be read"):
            if self.field not in batch:
                raise ValueError(f"data.field={self.field}: the dataset has no such column; it has {', '.join(batch)}")
            for row, value in enumerate(batch[self.field], first):

                def where(row: int = row) -> str:
                    return f"row {row}{of}"

                if (content := self._text(value, where, skipped)) is not None:
                    yield str(self.path), content
            first += len(batch[self.field])

    def nothing(self) -> ValueError:
        return ValueError(f"data.path={self.path}: holds no documents in its split {self.split}")

    def _dataset(self) -> Any:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> Any:
        try:
            import datasets
        except ImportError:
            raise ValueError("data.corpus=hf: needs datasets, which is not installed: pip install datasets") from None
        if int(datasets.__version__.split(".")[0]) < 4:
            raise ValueError(f"data.corpus=hf: needs datasets 4 or later, not {datasets.__version__}")
        folder = Path(str(self.path)).expanduser()
        is_local = is_there("data.path", folder)
        if not is_local and _is_path(str(self.path)):
            raise ValueError(f"data.path={self.path}: datasets cannot open it (there is no such file or folder)")
        saved = [name for name in ("state.json", "dataset_dict.json") if (folder / name).exists()]
        how = {"split": self.split, "streaming": self.streaming}
        builder = _builder(folder) if folder.is_file() else ""
        if builder is None:
            raise ValueError(f"data.path={self.path}: must be a file {', '.join(BUILDERS)}, packed or not")
        try:
            if builder:
                return datasets.load_dataset(builder, self.subset, data_files={"train": str(folder)}, **how)
            if not saved:
                chosen = _apart_from_outputs(folder) if is_local else None
                place = str(folder) if is_local else str(self.path)
                return datasets.load_dataset(place, self.subset, data_files=chosen, **how)
            dataset = datasets.load_from_disk(str(folder))
        except Exception as error:  # of a dozen kinds, several of them the network's
            line = " ".join(str(error).split())[:300]
            raise ValueError(f"data.path={self.path}: datasets cannot open it ({line})") from None
        if self.streaming:
            raise ValueError("data.streaming=true: the dataset lies on this disk already; must be false")
        if isinstance(dataset, dict):
            if self.split not in dataset:
                raise ValueError(f"data.split={self.split}: must be one of {', '.join(dataset)}")
            dataset = dataset[self.split]
        return dataset


def _builder(file: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return BUILDERS.get(suffixes[-1]) if suffixes else None


def _is_path(path: str) -> bool:
    """True for text that is no name on the hub: neither NAME nor OWNER/NAME."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix.lower() in {*BUILDERS, *PACKED}


def _apart_from_outputs(folder: Path) -> dict[str, list[str]] | None:
    """The files of each split that `datasets` finds in a folder, without those that farspan has written; None where it
    has written none there, and `datasets` may look by itself."""
    left: Counter[str] = Counter()
    for _ in files(folder, left=left):
        pass
    if not left[OURS]:
        return None
    from datasets.data_files import DataFilesDict, get_data_patterns

    patterns = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    inputs = {split: [file for file in paths if not is_inside(Path(file), folder)] for split, paths in patterns.items()}
    return {split: paths for split, paths in inputs.items() if paths}
