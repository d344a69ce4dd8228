"""Reads what wandb wrote offline: LevelDB's log framing around protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32 * 1024
FIRST, LAST, FULL = 2, 4, 1


def offline_files(run: Path) -> list[Path]:
    """What the attempts of a run wrote, in order."""
    return sorted(run.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)


def records(path: Path) -> Iterator[Any]:
    """Every `wandb_internal_pb2.Record` of a `run-*.wandb` file, in order."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # no room for a header: padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part = data[at + 7 : at + 7 + length]
        parts = part if kind in (FULL, FIRST) else parts + part
        if kind in (FULL, LAST):
            yield wandb_internal_pb2.Record.FromString(parts)  # type: ignore[attr-defined]
        at += 7 + length


def of_kind(path: Path, kind: str) -> list[Any]:
    """The records of one kind, unwrapped: run, alert, artifact, exit, metric."""
    return [getattr(record, kind) for record in records(path) if record.HasField(kind)]


def history(path: Path) -> list[dict[str, Any]]:
    """What each `run.log` call logged, in order."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in step.item}
        for step in of_kind(path, "history")
    ]


def config(path: Path) -> dict[str, Any]:
    """What the run was configured with at its start."""
    return {item.key: json.loads(item.value_json) for item in of_kind(path, "run")[0].config.update}


def summary(path: Path) -> dict[str, Any]:
    """The numbers that stand for the run."""
    items = (item for part in of_kind(path, "summary") for item in part.update)
    return {item.key: json.loads(item.value_json) for item in items if item.key}
