"""The run that comes of a stage, and what a stage refuses."""

from dataclasses import replace

import pytest

from launch.config.compose import checked, composed
from launch.errors import UserError
from launch.extend.compose import configured, positioned, rules_of
from train.run_config import Stage

MIXTURE = ["data=mixture", "data.sources.new.data.path=texts", "data.sources.new.weight=3"]


@pytest.fixture(scope="module")
def config():
    """That of a chain over a mixture: a hybrid, one layer of softmax attention in four."""
    return composed([*MIXTURE, "experiment=extend_context", "init_from=somewhere", "train.batch_tokens=4096"])


def test_a_stage_is_the_configuration_with_what_it_says(config):
    stage = Stage(length=8192, tokens=9000, positions={"base": 5e5}, lr=1e-4, weights={"old": 0.5})
    found = checked(configured(config, stage, 2, config.model)).to_dict()
    assert found["data"]["max_length"] == 8192 and found["train"]["tokens"] == 9000 and found["train"]["steps"] is None
    assert found["train"]["batch_tokens"] == 8192  # the length, where that is more
    assert found["optimizer"]["lr"] == 1e-4 and found["seed"] == config.seed + 2 and found["stages"] == []
    weights = {name: portion["weight"] for name, portion in found["data"]["sources"].items()}
    assert weights == {"new": 3, "old": 0.5}
    assert found["model"]["blocks"]["attn"]["mixer"]["positions"] == {
        "_target_": "models.positions.RoPE",
        "base": 5e5,
        "fraction": 1.0,
    }
    same = {"run", "schedule", "tracking", "evaluate", "precision", "parallel", "scheduler", "engine"}
    assert {key: found[key] for key in same} == {key: config.to_dict()[key] for key in same}
    assert config.data["max_length"] == 4096 and config.stages, "the chain's own is left as it was"


def test_what_a_stage_does_not_say_is_as_it_was(config):
    found = configured(config, Stage(length=2048, tokens=9000), 1, config.model)
    assert found["model"] == config.model.values and found["optimizer"] == config.optimizer.values
    assert found["data"]["sources"] == config.data["sources"] and found["train"]["batch_tokens"] == 4096
    assert (
        configured(config, Stage(length=2048, tokens=1, batch_tokens=6144), 1, config.model)["train"]["batch_tokens"]
        == 6144
    )


def test_a_rule_leaves_windows_alone_that_see_no_farther_where_others_do(config):
    blocks = config.model["blocks"]
    narrow = {**blocks["attn"], "mixer": {**blocks["attn"]["mixer"], "window": 64}}
    model = {**config.model.values, "blocks": {**blocks, "narrow": narrow}, "pattern": ["narrow", "attn"]}
    bases = [rule["base"] for rule in rules_of(positioned(model, {"base": 7.0}, 64)).values()]
    assert sorted(bases) == sorted([7.0, rules_of(model)["narrow", "mixer"]["base"]]) and bases[0] != bases[1]
    assert [rule["base"] for rule in rules_of(positioned(model, {"base": 7.0}, 63)).values()] == [7.0, 7.0]
    alone = {**model, "pattern": ["narrow"]}
    assert [rule["base"] for rule in rules_of(positioned(alone, {"base": 7.0}, 64)).values()] == [7.0]


def test_a_rule_keeps_base_and_fraction_and_keys_alone_keep_the_rule(config):
    yarn = {"_target_": "models.positions.YaRN", "factor": 4.0, "trained_length": 4096}
    model = positioned(config.model.values, yarn | {"base": 2e4})
    assert rules_of(model) == {("attn", "mixer"): {**yarn, "base": 2e4, "fraction": 1.0}}
    longer = rules_of(positioned(model, {"factor": 8.0}))["attn", "mixer"]
    assert longer["_target_"] == "models.positions.YaRN" and longer["factor"] == 8.0 and longer["base"] == 2e4
    again = rules_of(positioned(model, {"_target_": "models.positions.RoPE"}))["attn", "mixer"]
    assert again == {"_target_": "models.positions.RoPE", "base": 2e4, "fraction": 1.0}
    none = positioned(model, {"_target_": "models.positions.NoPE"})
    assert (
        none["blocks"]["attn"]["mixer"]["positions"] == {"_target_": "models.positions.NoPE"} and rules_of(none) == {}
    )


def test_only_layers_with_rotary_positions_have_a_rule(config):
    blocks = dict(config.model["blocks"])
    attn = {**blocks["attn"], "mixer": {**blocks["attn"]["mixer"], "positions": {"_target_": "models.positions.NoPE"}}}
    assert rules_of(config.model.values).keys() == {("attn", "mixer")}
    none = {**config.model.values, "blocks": blocks | {"attn": attn}}
    assert rules_of(none) == {} and positioned(none, None) is none
    with pytest.raises(ValueError, match="positions: must be null, no layer"):
        positioned(none, {"base": 5e5})


@pytest.mark.parametrize(
    "values, said",
    [
        ({"weights": {"olt": 1.0}}, "weights.olt: no such source; nearest: old"),
        ({"weights": {"old": -1.0}}, r"weights.old=-1.0: must not be negative"),
        ({"lr": 0.0}, "lr=0.0: must be above 0"),
        ({"tokens": -5}, "tokens=-5: must be above 0"),
        ({"positions": [1]}, r"positions=\[1\]: must be an object"),
    ],
)
def test_what_a_stage_refuses(config, values, said):
    with pytest.raises(ValueError, match=said):
        configured(config, Stage(**{"length": 8192, "tokens": 9000, **values}), 1, config.model)


def test_a_batch_that_grows_is_not_a_stages(config):
    grows = replace(config, train=replace(config.train, batch_tokens=[[0, 4096], [9000, 8192]]))
    with pytest.raises(ValueError, match="batch_tokens: missing"):
        configured(grows, Stage(length=4096, tokens=9000), 1, config.model)
    assert configured(grows, Stage(length=4096, tokens=9000, batch_tokens=4096), 1, config.model)


@pytest.mark.parametrize(
    "override, said",
    [
        ("stages=3", "stages=3: expected a list of a section"),
        ("stages=[3]", r"stages\[0\]=3: expected a section"),
        ("stages=[{length: 8192, tokens: yes}]", r"stages\[0\].tokens=yes: expected a whole number"),
        ("stages=[{length: 8192, tokens: 5, weights: {a: b}}]", r"stages\[0\].weights.a=b: expected a number"),
        ("stages=[{length: 8192, tokens: 5, positions: {_target_: os.system}}]", r"stages\[0\].positions._target_=os"),
        ("stages=[{length: 8192, tokens: 5}, {length: 8192}]", r"stages\[1\].tokens: missing"),
    ],
)
def test_keys_and_types_are_checked_like_the_rest(override, said):
    with pytest.raises(UserError, match=said):
        composed([override])
