"""`prepare` beside `datasets.map`, on the same generated text with the same tokenizer, in the same run.

    python -m tests.benchmarks.prepare [megabytes=64] [workers=1] [repeats=1] [folder=…]

Both read JSON lines that hold documents of log-normal lengths. `datasets` has them converted to its own table before
the clock starts; `prepare` parses them, hashes documents and writes a complete store with its card. Tokens per second
of CPU time, of all processes of each together, which other processes on the machine disturb least; and the most memory
that they had together, sampled: anonymous (cannot be dropped) and proportional (with its share of mapped files).
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

VOCABULARY = 8192
_WORDS = 40_000
_SAMPLE_S = 0.05

OURS = """
import sys
from data.corpora.records import Jsonl
from data.stores.store import build
from data.hf_tokenizer import from_file
source, tokenizer, folder, workers = sys.argv[1:]
print(build(Jsonl(path=source), from_file(tokenizer), folder + "/store", workers=int(workers)).card["tokens"])
"""
THEIRS = """
import sys
import datasets
from tokenizers import Tokenizer
source, tokenizer, folder, workers = sys.argv[1:]
tokenizer = Tokenizer.from_file(tokenizer)
def encode(batch):
    found = tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)
    return {"ids": [each.ids for each in found], "length": [len(each.ids) for each in found]}
table = datasets.load_from_disk(source)
workers = int(workers)
made = table.map(
    encode, batched=True, num_proc=workers if workers > 1 else None, remove_columns=["text"],
    cache_file_name=folder + "/mapped.arrow",
)
print(sum(made.with_format("numpy")["length"]) + len(made))
"""


class Measured(NamedTuple):
    """tokens: made. cpu, wall: seconds. anonymous, proportional: bytes at the most."""

    tokens: int
    cpu: float
    wall: float
    anonymous: int
    proportional: int


def generate(path: Path, megabytes: float, seed: int = 0) -> None:
    """JSON lines of words that are drawn as in a language: by rank (Zipf), in documents of log-normal lengths."""
    draw = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = ["".join(draw.choice(letters, draw.integers(2, 10))) for _ in range(_WORDS)]
    chances = 1 / np.arange(2, _WORDS + 2)
    chances /= chances.sum()
    left = int(megabytes * 1e6)
    with open(path, "w") as stream:
        while left > 0:
            lengths = np.minimum(draw.lognormal(5.2, 1.2, 500).astype(int) + 1, 20_000)
            picked = iter(draw.choice(_WORDS, int(lengths.sum()), p=chances).tolist())
            for length in lengths.tolist():
                text = " ".join(words[next(picked)] for _ in range(length))
                left -= stream.write(json.dumps({"text": text}) + "\n")


def measure(code: str, *arguments: str) -> Measured:
    """Runs a script in a session of its own, and watches the memory of all that is in it."""
    env = {
        **os.environ,
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    before, began = os.times(), time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    peaks = [0, 0]

    def watch() -> None:
        while process.poll() is None:
            for i, now in enumerate(_memory(process.pid)):
                peaks[i] = max(peaks[i], now)
            time.sleep(_SAMPLE_S)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stdout is not None
    out = process.stdout.read()
    code_of = process.wait()
    watcher.join()
    after = os.times()
    if code_of:
        raise SystemExit(f"exit {code_of}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Measured(int(out.split()[-1]), cpu, time.monotonic() - began, *peaks)


def _memory(session: int) -> tuple[int, int]:
    """(anonymous, proportional) bytes of all processes of a session."""
    anonymous = proportional = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[3]) != session:
                continue
            facts = dict(line.split()[:2] for line in (stat.parent / "smaps_rollup").read_text().splitlines()[1:])
        except (OSError, ValueError, IndexError):
            continue
        anonymous += int(facts.get("Anonymous:", 0)) * 1024
        proportional += int(facts.get("Pss:", 0)) * 1024
    return anonymous, proportional


def main(arguments: list[str]) -> None:
    given = dict(argument.split("=", 1) for argument in arguments)
    megabytes, workers = float(given.get("megabytes", 64)), given.get("workers", "1")
    place = Path(tempfile.mkdtemp(prefix="prepare-", dir=given.get("folder")))
    try:
        import datasets

        from data.tokenizer import Untrained

        source, table, tokenizer = place / "x.jsonl", place / "table", place / "tokenizer.json"
        generate(source, megabytes)
        with open(source) as stream:
            texts = (json.loads(line)["text"].encode() for line, _ in zip(stream, range(4000), strict=False))
            tokenizer.write_text(Untrained(VOCABULARY).trained(texts).text)
        load = {"data_files": str(source), "split": "train", "cache_dir": str(place / "cache")}
        datasets.load_dataset("json", **load).save_to_disk(str(table))
        print(f"{source.stat().st_size / 1e6:,.0f} MB of text, {workers} processes, vocabulary {VOCABULARY:,}\n")
        heads = f"{'wall s':>9}{'CPU s':>9}{'tokens/CPU s':>14}{'anonymous MB':>14}{'with files MB':>15}"
        print(f"{'':<14}{'tokens':>14}{heads}")
        for _ in range(int(given.get("repeats", 1))):
            rows = {}
            for name, code, read in (("prepare", OURS, source), ("datasets.map", THEIRS, table)):
                out = place / "out"
                out.mkdir()
                rows[name] = found = measure(code, str(read), str(tokenizer), str(out), workers)
                shutil.rmtree(out)
                memory = f"{found.anonymous / 1e6:>14,.0f}{found.proportional / 1e6:>15,.0f}"
                speed = f"{found.wall:>9.1f}{found.cpu:>9.1f}{found.tokens / found.cpu:>14,.0f}"
                print(f"{name:<14}{found.tokens:>14,}{speed}{memory}", flush=True)
            ours, theirs = rows.values()
            assert ours.tokens == theirs.tokens
            ratios = (theirs.wall / ours.wall, theirs.cpu / ours.cpu)
            memories = (ours.anonymous / theirs.anonymous, ours.proportional / theirs.proportional)
            print(
                f"{'ratio':<14}{'':>14}{ratios[0]:>9.2f}{'':>9}{ratios[1]:>14.2f}{memories[0]:>14.2f}{memories[1]:>15.2f}\n"
            )
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main(sys.argv[1:])
