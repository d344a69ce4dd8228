"""An evaluation gives the same numbers on any number of ranks, and those of a plain loop over the documents."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from launch.config.compose import composed
from models.sequence import Whole
from tests.jobs import SMALL, overrides
from train.build import build
from train.checkpoints.checkpoint import complete
from train.evaluation.run import open_batches, run
from train.evaluation.texts import documents
from train.inference.decode import Decoder

pytestmark = pytest.mark.dist

SIZES = [
    "evaluate.length=300",
    "evaluate.tokens=3000",
    "evaluate.samples=2",
    "evaluate.depths=3",
    "evaluate.context=64",
]
SIZES += ["evaluate.lengths=[130,256]", "evaluate.documents=3"]
TASK = ["data=mqar", "data.max_length=64", "data.symbols=16", "data.pairs=2", "data.heldout_tokens=512"]


def trained(config, folder):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps(config.to_dict()))  # JSON is YAML
    build({"config": config, "run_dir": str(folder), "device": "cpu"}).fit()


def measured(run_world, tmp_path, config, name, world, *, data=None, **evaluate):
    """results.json of a world of so many ranks."""
    parallel, evaluate = replace(config.parallel, data=data), replace(config.evaluate, **evaluate)
    config = replace(config, parallel=parallel, evaluate=evaluate)
    (path,) = complete(tmp_path / "run" / "checkpoints")
    order = {"config": config, "checkpoint": str(path), "device": "cpu", "trained": 64}
    order |= {key: str(tmp_path / f"{name}.{key}") for key in ("results", "progress")}
    run_world(world, run, order)
    return json.loads((tmp_path / f"{name}.results").read_text())


def numbers(node, path=""):
    if isinstance(node, dict | list):
        pairs = node.items() if isinstance(node, dict) else enumerate(node)
        return {k: v for key, child in pairs for k, v in numbers(child, f"{path}.{key}").items()}
    return {path: node}


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp64", 1e-9), pytest.param("fp32", 1e-5, marks=pytest.mark.slow)]
)
def test_one_rank_and_four_give_the_same_numbers(run, tmp_path, precision, tolerance):
    more = [f"precision={precision}", "model.blocks.gla.ffn.top_k=4", *SIZES]
    config = composed([*overrides(tmp_path, *more), "train.steps=2", "cluster.workers=1"])
    run(1, trained, config, tmp_path / "run")
    one = measured(run, tmp_path, config, "one", 1)
    pairs: dict = {"data": 2, "span_tokens": 40}  # of ranks, span after span
    others = {"in pairs": (4, pairs)} if precision == "fp64" else {"four": (4, {})}
    for name, (world, options) in others.items():
        other = numbers(measured(run, tmp_path, config, name, world, **options))
        for key, value in numbers(one).items():
            if isinstance(value, float):
                assert other[key] == pytest.approx(value, rel=tolerance, abs=tolerance), (name, key)
            else:
                assert other[key] == value, (name, key)
    assert set(one) == {
        "checkpoint",
        "length",
        "loss",
        "positions",
        "needle",
        "recall",
        "copy",
        "long_range",
        "extrapolation",
    }
    assert {"part": "long_range", "done": 0, "of": 1} in map(
        json.loads, (tmp_path / "one.progress").read_text().splitlines()
    )
    if precision == "fp64":
        against_a_loop(one, config, tmp_path)


def against_a_loop(found, config, tmp_path):
    """The loss, its bins and the long-range rows from logits of one document after another."""
    (path,) = complete(tmp_path / "run" / "checkpoints")
    model = Decoder.load(config.model.values, path).model.double()
    model.compute = torch.float64
    (held,) = open_batches(config).heldout_documents

    def nats(tokens):
        tokens = torch.from_numpy(np.asarray(tokens, dtype=np.int64))
        with torch.no_grad():
            logits = model(tokens[None], Whole.of(torch.arange(len(tokens))[None])).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none").numpy()

    every, at, by_length, gains, read = [], [], {}, [], 0
    for document in documents(held):
        if read >= 3000:
            break
        each = nats(document[:300])
        read += min(len(document), 300)
        every.append(each)
        at += range(1, len(each) + 1)
        by_length.setdefault(2 ** int(math.log2(len(document))), []).append(each)
    loss, every = found["loss"], np.concatenate(every)
    assert loss["loss"] == pytest.approx(every.mean(), rel=1e-6) and loss["targets"] == len(every)
    assert loss["loss_per_byte"] == loss["loss"] and list(loss["sources"]) == ["corpus"]
    assert [(row["from"], row["documents"]) for row in loss["lengths"]] == sorted(
        (k, len(v)) for k, v in by_length.items()
    )
    for row in loss["lengths"]:
        assert row["loss"] == pytest.approx(np.concatenate(by_length[row["from"]]).mean(), rel=1e-6)
    for row in found["positions"]:
        inside = [e for e, t in zip(every, at, strict=True) if row["from"] <= t < 2 * row["from"]]
        assert len(inside) == row["targets"] and row["loss"] == pytest.approx(np.mean(inside), rel=1e-6)
    assert [row["length"] for row in found["long_range"]["lengths"]] == [128, 256]
    for document in [d for d in documents(held) if len(d) > 256][:3]:
        gains.append(nats(document[192:257])[-16:].mean() - nats(document[:257])[-16:].mean())
    row = found["long_range"]["lengths"][1]
    assert row["documents"] == len(gains) and row["gain"] == pytest.approx(np.mean(gains), rel=1e-5)
    assert row["gain"] == pytest.approx(row["near"] - row["full"])


def test_of_a_generated_task_what_its_held_out_examples_ask_is_measured(run, tmp_path):
    kept = [key for key in SMALL if not key.startswith("data")]
    given = [*kept, *TASK, "train.steps=2", "cluster.workers=1", "precision=fp64", "evaluate.samples=2"]
    config = composed(given)
    run(1, trained, config, tmp_path / "run")
    found = measured(run, tmp_path, config, "one", 1)
    assert found["loss"]["targets"] == 2 * 8 and list(found["loss"]["sources"]) == ["mqar"]
    assert found["needle"]["words"] is False and found["needle"]["lengths"] == [64]
    assert found["recall"]["symbols"] == 16 and found["recall"]["chance"] == 1 / 16
    assert found["long_range"]["lengths"] == []
    (last,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1:]
    assert found["loss"]["loss"] == pytest.approx(last["heldout_loss"], rel=1e-9)
    before = measured(run, tmp_path, config, "one", 1, parts=["copy"], samples=3)
    assert before["loss"] == found["loss"] and before["copy"] != found["copy"]  # only what is measured is replaced
