"""Reads what wandb wrote offline: LevelDB's log framing around protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32 * 1024
FIRST, LAST, FULL = 2, 4, 1


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


def history(path: Path) -> list[dict[str, Any]]:
    """What each `run.log` call logged, in order."""
    steps = (record.history for record in records(path) if record.HasField("history"))
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in step.item} for step in steps
    ]
