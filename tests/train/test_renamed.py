"""Names that classes had in the configurations of older runs."""

import pytest

from launch.config.compose import composed
from launch.config.validate import class_of
from models.hub.architecture import target
from train import configuration
from train.instantiate import construct, is_class
from train.renamed import RENAMED

OLD = """\
model:
  _target_: models.lm.LM
  blocks:
    attn:
      _target_: models.block.Block
      mixer: {_target_: models.mixers.attention.Attention, positions: {_target_: models.rope.YaRN}}
data: {_target_: data.mixture.Mixture, sources: {a: {_target_: data.mixture.Portion}}}
optimizer: {_target_: train.muon.Muon}
schedule: {_target_: train.schedule.WSD, begin: 0}
"""


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_an_old_name_is_that_of_todays_class(old):
    found = class_of("key", old)
    assert found is class_of("key", RENAMED[old]) and found.__name__ == old.rpartition(".")[2]
    assert is_class(RENAMED[old])
    if old.startswith("models."):
        assert target(found) == RENAMED[old]  # the hub's tables and a configuration say the same


def test_a_configuration_of_an_older_run_is_read_with_todays_names(tmp_path):
    (tmp_path / "config.yaml").write_text(OLD)
    found = configuration.read(tmp_path)
    assert found["model"]["_target_"] == "models.LM"
    attention = found["model"]["blocks"]["attn"]["mixer"]
    assert (attention["_target_"], attention["positions"]["_target_"]) == (
        "models.mixers.Attention",
        "models.positions.YaRN",
    )
    assert found["data"]["sources"]["a"]["_target_"] == "data.Portion"
    assert (found["optimizer"]["_target_"], found["schedule"]["_target_"]) == (
        "train.optim.Muon",
        "train.schedules.WSD",
    )


def test_an_old_name_on_the_command_line_becomes_todays():
    found = composed(["optimizer._target_=train.adamw.AdamW"])
    assert found.optimizer.target == "train.optim.AdamW"


def test_an_old_name_builds_todays_class():
    from train.schedules import Constant

    assert isinstance(construct({"_target_": "train.schedule.Constant"}), Constant)
