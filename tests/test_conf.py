"""Every YAML file composes, is accepted whole, and builds."""

import pytest
import torch

from launch.compose import composed, groups
from models.mixers import MIXERS
from parallel.schedule import SCHEDULERS
from parallel.sequence import TRANSPORTS
from train.construct import construct
from train.engines import ENGINES

NEEDED = {"data=text": ["data.path=somewhere"]}
CHOICES = [f"{group}={option}" for group, options in groups().items() if group != "mixer" for option in options]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_option_composes_and_builds(choice):
    config = composed([choice, *NEEDED.get(choice, [])])
    for key in ("data", "scheduler", "engine", "schedule", "tracking"):
        construct(config[key])
    with torch.device("meta"):
        model = construct(config["model"])
    construct(config["optimizer"])(model.parameters())
    if choice == "model=linear_moe_tiny":
        assert 4e6 < sum(p.numel() for p in model.parameters()) < 6e6


def test_every_mixer_and_registered_class_has_its_yaml():
    known = groups()
    assert known["mixer"] == sorted(MIXERS)
    assert known["scheduler"] == sorted(SCHEDULERS) and known["engine"] == sorted(ENGINES)
    for kind, named in TRANSPORTS.items():
        for name in named:
            composed([f"parallel.transport.{kind}={name}"])


def test_a_mixer_can_be_placed_in_a_model_by_name():
    config = composed(["mixer@model.blocks.gla.mixer=gated_deltanet", "model.blocks.gla.mixer.heads=2"])
    assert config["model"]["blocks"]["gla"]["mixer"]["_target_"] == "models.mixers.gated_deltanet.GatedDeltaNet"
