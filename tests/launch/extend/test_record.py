"""What a chain keeps of its measurements, and shows, whichever parts were asked for."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launch.extend.plot import draw, table
from launch.extend.record import Record

NEEDLE = {"lengths": [512], "depths": [0.0, 1.0], "logprob": [[-4.0, -2.0]], "exact": [[0.0, 1.0]]}
ROWS = [{"from": 64, "loss": 2.5}, {"from": 256, "loss": 2.25}]
TOLD = ["the slowest pair turns by 1 rad over 512 tokens"]


@pytest.mark.parametrize("parts", [{"needle": NEEDLE}, {"positions": ROWS}, {"needle": NEEDLE, "positions": ROWS}, {}])
def test_any_parts_are_kept_and_shown(tmp_path: Path, parts: dict[str, Any]) -> None:
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"checkpoint": "step-1", "length": 512, **parts}))
    leg: Any = SimpleNamespace(
        stage=SimpleNamespace(length=512),
        flight=SimpleNamespace(train=SimpleNamespace(total_tokens=1024)),
        config=SimpleNamespace(optimizer={"lr": 1e-3}),
        positions=TOLD,
    )
    record = Record(tmp_path, 128, [512])
    record.add("before", results, None)
    record.add("1-512", results, leg)
    facts = json.loads((tmp_path / "extension.json").read_text())
    assert [stage["length"] for stage in facts["stages"]] == [128, 512]
    assert facts["stages"][1]["rotary"] == TOLD and facts["stages"][1].get("positions") == parts.get("positions")
    last = table(facts)[-1].split()
    assert last == ["1-512", *(["-3.00", "(50%)"] if "needle" in parts else []), *(["2.2500"] * ("positions" in parts))]
    draw(tmp_path / "extension.png", facts)
    assert (tmp_path / "extension.png").stat().st_size > 1000
    assert "1-512" in Record(tmp_path, 128, [512]) and "2-1024" not in Record(tmp_path, 128, [512])
