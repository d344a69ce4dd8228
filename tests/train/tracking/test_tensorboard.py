"""What TensorBoard would read: the files' framing and events, by tensorboardX's own messages."""

from __future__ import annotations

import math
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.train.tracking.common import facts, record, track
from train.tracking import Tracking
from train.tracking.panels import MAX_BINS, histograms

TENSORBOARD: dict[str, Any] = {"mode": "disabled", "tensorboard": True}


def events(path: Path) -> list[Any]:
    """A file's events: length, its checksum, the event, its checksum."""
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto.event_pb2 import Event

    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        body = data[at + 12 : at + 12 + length]
        for part, place in ((data[at : at + 8], at + 8), (body, at + 12 + length)):
            crc = crc32c(part)
            masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
            assert struct.unpack_from("<I", data, place)[0] == masked
        found.append(Event.FromString(body))
        at += 16 + length
    return found


def files(run: Path) -> list[Path]:
    return sorted((run / "tensorboard").glob("events.out.tfevents.*"))


def values(event: Any) -> dict[str, Any]:
    return {v.tag: v.histo if v.HasField("histo") else v.simple_value for v in event.summary.value}


def test_every_number_is_there_over_tokens(tmp_path: Path) -> None:
    _, said = track(tmp_path, range(1, 4), **TENSORBOARD)
    assert said == [] and not (tmp_path / "wandb").exists()
    (path,) = files(tmp_path)
    head, *steps = events(path)
    assert head.file_version == "brain.Event:2"
    assert [(e.step, e.wall_time) for e in steps] == [(s * 4096, 1761000000.0 + s) for s in (1, 2, 3)]
    last = values(steps[-1])
    assert last["loss"] == pytest.approx(4 / 3) and last["seconds/forward"] == 0.25 and last["step"] == 3
    assert last["expert_load/layers.0/max"] == pytest.approx(1.6)
    assert last["expert_load/layers.0/cv"] == pytest.approx(0.2**0.5)  # of 0.4, 0.8, 1.2 and 1.6


def test_histograms_are_those_of_wandb(tmp_path: Path) -> None:
    for switch in (True, False):
        run = tmp_path / str(switch)
        tracker = Tracking(**TENSORBOARD, histograms=switch).open(facts(run), lambda line: None)
        tracker.log({**record(1), "documents": [[512, 3], [1024, 1]], "heldout_loss": math.inf, "note": "text"})
        tracker.finish({})
        found = values(events(files(run)[0])[-1])
        assert math.isnan(found["heldout_loss"]) and "note" not in found
        assert ("documents" in found) == ("expert_load/layers.0/experts" in found) == switch
        if switch:
            documents, experts = found["documents"], found["expert_load/layers.0/experts"]
            assert (documents.min, documents.max, documents.num) == (256, 1024, 4)
            assert (list(documents.bucket_limit), list(documents.bucket)) == ([512, 1024], [3, 1])
            assert documents.sum == 3 * 384 + 768 and documents.sum_squares == 3 * 384**2 + 768**2
            assert list(experts.bucket) == [0.1, 0.2, 0.3, 0.4] and list(experts.bucket_limit) == [1, 2, 3, 4]


def test_a_step_that_is_trained_again_is_written_again(tmp_path: Path) -> None:
    track(tmp_path, range(1, 6), **TENSORBOARD)
    track(tmp_path, range(4, 8), attempt=2, **TENSORBOARD)
    before, after = ([(v["step"], v["attempt"]) for v in map(values, events(path)[1:])] for path in files(tmp_path))
    assert before == [(s, 1) for s in range(1, 6)] and after == [(s, 2) for s in range(4, 8)]


def test_both_sinks_get_the_same_stream(tmp_path: Path) -> None:
    from tests.wandb_file import history, offline_files

    track(tmp_path, range(1, 4), mode="offline", tensorboard=True)
    (wandb,), (tensorboard,) = map(history, offline_files(tmp_path)), map(events, files(tmp_path))
    for there, here in zip(wandb, map(values, tensorboard[1:]), strict=True):
        numbers = {name for name in there if not name.startswith("_") and "/experts/" not in name}
        assert numbers == {name for name, value in here.items() if isinstance(value, float)}
        assert all(here[name] == pytest.approx(there[name]) for name in numbers)


def test_without_tensorboardx_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    _, (line,) = track(tmp_path, range(1, 3), **TENSORBOARD)
    assert line.startswith("TensorBoard is off for this run: it needs tensorboardX, which cannot be imported (")


def test_many_experts_share_bins() -> None:
    load = [1 / 1300] * 1300
    (bins,) = histograms({"expert_load": {"layers.0": load}}).values()
    counts, edges = bins
    assert len(counts) <= MAX_BINS and len(edges) == len(counts) + 1 and edges[-1] == 1300
    assert sum(counts) == pytest.approx(1) and counts[0] == pytest.approx(3 / 1300)
