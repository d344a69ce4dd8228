"""`farspan verify`: what it keeps of a run, what it says of right and wrong layouts, and whom it blames."""

import pytest

from launch.cli import main
from launch.config.compose import composed
from launch.verify import proof
from launch.verify.proof import Blame, Reference, blame
from launch.verify.shrink import MOST, shrink
from parallel.schedule.mesh import Mesh
from tests import foreign
from tests.foreign import FOREIGN, RIGHT, rows, verdict
from tests.launch.processes import ROOT
from train.verify.trace import Difference, Place, Verdict

SMALL = ("tracking.mode=disabled", "cluster=none")


def kinds(values):
    """Each kind of layer of a model, as a mixer and a feed-forward, and whether one hands something on."""
    pattern = [values["pattern"][i % len(values["pattern"])] for i in range(values["layers"])]
    front = values.get("first_k_dense", 0)
    blocks = values["blocks"]
    name = lambda part: None if part is None else part["_target_"]  # noqa: E731
    return {
        (name(blocks[k]["mixer"]), name(values["dense"]) if i < front else name(blocks[k]["ffn"]))
        for i, k in enumerate(pattern)
    }


@pytest.mark.composes
@pytest.mark.parametrize(
    "model", ["kimi_linear_tiny", "rwkv7_tiny", "qwen3_next_tiny", "linear_moe_a1b_7b", "jamba_tiny"]
)
def test_a_small_run_has_every_kind_of_layer_and_its_layout(model):
    config = composed([*SMALL, f"model={model}", "cluster.workers=4", "parallel.data=2", "engine.recompute=full"])
    shrunk = shrink(config)
    small, large = shrunk.config.model.values, config.model.values
    assert kinds(small) == kinds(large)
    assert small["dim"] <= 64 and small["layers"] <= 4 and not shrunk.notes
    assert shrunk.config.engine["recompute"] == "full" and shrunk.config.parallel.mesh(4) == Mesh(data=2, sequence=2)
    for name, block in small["blocks"].items():
        big = large["blocks"][name]["mixer"]
        for key in ("kv_heads", "value_heads"):
            if big.get(key):
                assert (big[key] < big["heads"]) == (block["mixer"][key] < block["mixer"]["heads"]), (name, key)
                assert (big[key] > big["heads"]) == (block["mixer"][key] > block["mixer"]["heads"]), (name, key)


@pytest.mark.composes
def test_what_a_small_run_cannot_keep_is_said():
    more = ["cluster.workers=64", "parallel.data=8", "model.blocks.gla.ffn.capacity_factor=1.5"]
    more += ["train.span_tokens=256", "train.span_gradient=truncated", "scheduler.tokens_per_rank=512"]
    shrunk = shrink(composed([*SMALL, *more]))
    assert [line.partition(":")[0] for line in shrunk.notes] == [
        "mesh data 8 × sequence 8",
        "capacity_factor=1.5",
        "train.span_gradient=truncated",
    ]
    assert shrunk.sizes["data"] == shrunk.sizes["sequence"] == 2 and shrunk.config.cluster.workers == 4 <= MOST
    plan = shrunk.config.scheduler.build().plan(
        0, shrunk.config.data.build().open(0, None).lengths(0), data=2, sequence=2
    )
    assert len(plan.micro_steps) > 1


REFUSED = {
    ("parallel.sequence=3",): "parallel.sequence=3: must divide cluster.workers=2",
    ("cluster.workers=8", "parallel.transport.attention=ulysses"): "parallel.transport.attention=ulysses: ",
    ("runs/none_such",): "RUN=runs/none_such: ",
    ("model.dim=0",): "model.dim=0: must be at least 1",
    ("--fast",): "--fast: no such option",
}


@pytest.mark.composes
@pytest.mark.parametrize("arguments", REFUSED)
def test_a_wrong_input_is_one_line(capsys, arguments):
    assert main(["verify", *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"farspan verify: {REFUSED[arguments]}") and said.err.count("\n") == 1 and not said.out


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("contiguous", "sequence 2"),
        pytest.param("data 2 x sequence 2, recomputed, accumulated", "data 2 × sequence 2", marks=pytest.mark.slow),
    ],
)
def test_a_right_layout_is_said_to_be_right(capsys, name, said):
    """As a user runs it."""
    assert main(["verify", *RIGHT[name]]) == 0
    mesh, model, last = capsys.readouterr().out.splitlines()
    assert mesh == f"verify      {said}: {2 * said.count('2')} processes beside one, in fp64"
    assert model.startswith("model       3 layers (gla, gdn, attn) of width 32, 5 sequences of 48 tokens")
    assert last.startswith("right       ") and "of what rounding may" in last


# The place where each is found first; all others are in `make foreign`.
FIRST = {
    "run_each_ranks_recurrence_from_nothing": "output of layers.0 in step 1",
    "leave_a_ranks_weights_as_they_are": "weight of ",
}


@pytest.mark.dist
@pytest.mark.parametrize("name", FIRST)
def test_a_fault_of_another_system_is_found_where_it_is(name):
    found = verdict(name, FOREIGN[name].overrides, 1)
    assert not isinstance(found, str) and found.first is not None
    assert str(found.first.place).startswith(FIRST[name])


def test_there_are_enough_faults_and_their_table_is_in_the_documentation():
    assert len(FOREIGN) >= 25 and len(RIGHT) >= 20
    assert rows() in (ROOT / "docs" / "verify.md").read_text()


def blamed(monkeypatch, *overrides, wrong):
    """Whom a fault is blamed on that shows where `wrong(config)`."""
    shrunk = shrink(composed([*SMALL, *overrides]))
    place = Place(0, "scalar", "loss")

    def judged(config, held, steps):
        found = Difference(place, 1.0, 2.0 if wrong(config) else 0.5, 0)
        return Verdict(found if wrong(config) else None, found, 1)

    monkeypatch.setattr(proof, "judged", judged)
    return blame(shrunk, Reference({}, {}), 1)


FOUR = ("cluster.workers=4", "parallel.data=2")


@pytest.mark.composes
def test_the_axis_is_the_one_without_which_all_is_right(monkeypatch):
    def mesh(config):
        return config.parallel.mesh(config.cluster.workers)

    assert blamed(monkeypatch, *FOUR, wrong=lambda c: mesh(c).sequence > 1) == Blame(("sequence",), (), True)
    assert blamed(monkeypatch, *FOUR, wrong=lambda c: mesh(c).data > 1) == Blame(("data",), (), True)
    assert blamed(monkeypatch, *FOUR, wrong=lambda c: mesh(c).world > 1) == Blame(("data", "sequence"), (), True)
    assert blamed(monkeypatch, *FOUR, wrong=lambda c: mesh(c).world > 2) == Blame(("data", "sequence"), (), False)
    assert blamed(monkeypatch, *FOUR, wrong=lambda c: True) == Blame((), (), True)


@pytest.mark.composes
def test_the_option_is_the_one_without_which_all_is_right(monkeypatch):
    more = ["engine.recompute=full", "scheduler.tokens_per_rank=99", "parallel.transport.attention=ring"]
    found = blamed(monkeypatch, *FOUR, *more, wrong=lambda c: c.engine["recompute"] == "full")
    assert found == Blame((), ("engine.recompute=full",), True)
    found = blamed(
        monkeypatch,
        *FOUR,
        *more,
        wrong=lambda c: c.parallel.transport.attention == "ring" and c.parallel.mesh(c.cluster.workers).sequence > 1,
    )
    assert found == Blame(("sequence",), ("parallel.transport.attention=ring",), True)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("name", FOREIGN)
def test_every_fault_of_another_system_is_found(name):
    found = verdict(name, FOREIGN[name].overrides)
    assert isinstance(found, str) or found.first is not None


def broken(order):
    """The entry of ranks that have a fault."""
    foreign.traced("run_each_ranks_recurrence_from_nothing", order)


@pytest.mark.slow
@pytest.mark.e2e
def test_a_wrong_layout_is_said_to_be_wrong_with_layer_and_axis(capsys, monkeypatch):
    monkeypatch.setattr(proof, "ENTRY", "tests.launch.test_verify:broken")
    assert main(["verify", *RIGHT["data 2 x sequence 2"]]) == 1
    said = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert said["wrong"].startswith("output of layers.0 in step 1: differs by ")
    assert said["layer"] == "layers.0, of kind gla (GatedLinearAttention)"
    assert said["axis"] == "sequence"
