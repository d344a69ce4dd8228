"""A folder that TensorBoard reads: `tensorboard --logdir RUN/tensorboard`. The x axis is tokens.

An event holds all of a record's numbers, so the file is written with tensorboardX's RecordWriter; its SummaryWriter
makes an event of each number and hands it to a process-wide queue and a thread of its own, where we have both already.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from train.tracking.facts import Facts
from train.tracking.panels import Histogram, histograms, scalars

FLUSH_S = 10.0  # what a crash may take from the copy; metrics.jsonl loses nothing


class TensorBoard:
    """The sink. Each attempt adds a file to the folder, so that a step which is trained again appears again."""

    name = "TensorBoard"
    patience = 15.0

    def __init__(self, facts: Facts, *, with_histograms: bool = True):
        self._folder = facts.run_dir / "tensorboard"
        self._histograms = with_histograms
        self._writer: Any = None
        self._flushed = 0.0

    def start(self) -> None:
        """Raises RuntimeError where tensorboardX is missing, OSError where the folder cannot be written."""
        try:
            from tensorboardX import RecordWriter
            from tensorboardX.proto.event_pb2 import Event
        except ImportError as error:
            raise RuntimeError(f"it needs tensorboardX, which cannot be imported ({error})") from None
        self._folder.mkdir(parents=True, exist_ok=True)
        self._writer = RecordWriter(str(self._fresh()))
        self._writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())

    def log(self, record: dict[str, Any], line: int) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        numbers = {n: x for n, x in scalars(record).items() if isinstance(x, int | float)}
        values = [Summary.Value(tag=name, simple_value=number) for name, number in numbers.items()]
        if self._histograms:
            values += [Summary.Value(tag=name, histo=_proto(bins)) for name, bins in histograms(record).items()]
        event = Event(wall_time=record["time"], step=record["tokens"], summary=Summary(value=values))
        self._writer.write(event.SerializeToString())
        if time.monotonic() > self._flushed + FLUSH_S:
            self._writer.flush()
            self._flushed = time.monotonic()

    def checkpoint(self, path: Path, facts: dict[str, Any]) -> None:
        """TensorBoard has no place for it."""

    def alert(self, title: str, text: str, level: str) -> None:
        """TensorBoard alerts nobody."""

    def finish(self, summary: dict[str, Any], exit_code: int) -> None:
        self._writer.close()

    def _fresh(self) -> Path:
        """A name that no earlier attempt has, in the order of time as TensorBoard reads them."""
        stem = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}"
        count = 0
        while (path := self._folder / f"{stem}.{count}").exists():
            count += 1
        return path


def _proto(histogram: Histogram) -> Any:
    """TensorBoard's histogram: it also wants sums, which are those of the bins' middles."""
    from tensorboardX.proto.summary_pb2 import HistogramProto

    counts, edges = histogram
    middles = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
    return HistogramProto(
        min=edges[0],
        max=edges[-1],
        num=sum(counts),
        sum=sum(n * x for n, x in zip(counts, middles, strict=True)),
        sum_squares=sum(n * x * x for n, x in zip(counts, middles, strict=True)),
        bucket_limit=edges[1:],
        bucket=counts,
    )
