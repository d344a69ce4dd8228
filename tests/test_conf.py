"""Every YAML file in conf/ composes, is accepted whole, and builds: a new one is covered on the day it is written."""

import copy
import os
import shutil
from collections.abc import Iterator
from functools import cache, partial
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from launch.config import compose as composing
from launch.config import files
from launch.config.compose import composed
from launch.config.files import CONF
from launch.config.validate import OBJECTS, build
from models.mixers import MIXERS
from parallel.schedule import SCHEDULERS
from parallel.sequence import TRANSPORTS
from train.engines import ENGINES
from train.instantiate import construct

pytestmark = pytest.mark.composes

FILES = sorted(path.relative_to(CONF).with_suffix("") for path in CONF.glob("*/*.yaml"))
# A value for each key that some file leaves to its user.
REQUIRED = {"path": "somewhere", "sources.new.data.path": "somewhere", "store": "somewhere", "heads": 4, "kv_heads": 2}
REQUIRED |= {"factor": 4, "length": 8192, "trained_length": 2048, "high": 0.1, "middle": 0.01, "low": 0.001}
REQUIRED |= {"longest": 65_536, "short_factor": [1] * 32, "long_factor": [2] * 32}
MORE = {  # what else has to be given
    "cluster/ray_up": ["cluster.template.head_ip=10.0.0.1"],
    "experiment/continual": ["data.sources.new.data.path=somewhere"],
}


def overrides_for(file: Path) -> list[str]:
    """What puts a file into the default job: its group's option; of a group that is placed in another, there."""
    group, option = file.parts
    placed = files.written()[1]
    place = next((name for name in placed if name.partition("@")[0] == group), None)
    assert place is not None, f"conf/{group}/ is in no defaults list: nothing can choose {file}.yaml"
    key = place.partition("@")[2] or group
    missing = [name for name, value in files.leaves(files.option(group, option)).items() if value == "???"]
    unknown = [name for name in missing if name not in REQUIRED]
    assert not unknown, f"conf/{file}.yaml: give this test a value for {unknown}"
    return [f"{place}={option}", *(f"{key}.{name}={REQUIRED[name]}" for name in missing), *MORE.get(str(file), [])]


def nodes(tree: object) -> Iterator[dict]:
    """The outermost nodes that name a class."""
    if isinstance(tree, dict) and "_target_" in tree:
        yield tree
    elif isinstance(tree, dict):
        for child in tree.values():
            yield from nodes(child)


def together(files: list[Path]) -> list[tuple[Path, ...]]:
    """Every file in one of these: a file of each group beside the others, since a composition takes long; models and
    experiments alone, which say what stands in several groups."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(file.parts[0], []).append(file)
    alone = [(file,) for group in ("model", "experiment") for file in groups.pop(group, [])]
    rows = zip_longest(*groups.values())
    return [*alone, *(tuple(file for file in row if file is not None) for row in rows)]


@pytest.mark.parametrize("several", together(FILES), ids=lambda several: " ".join(map(str, several)))
def test_every_file_composes_is_accepted_and_builds(several):
    config = composed([override for file in several for override in overrides_for(file)])
    for file in several:
        if file.parts[0] == "mixer":
            target = config.model["blocks"]["gla"]["mixer"]["_target_"]
            assert target == f"models.mixers.{MIXERS[file.parts[1]].__name__}"
    with torch.device("meta"):
        built = [construct(node) for node in nodes(config.to_dict())]
    assert len(built) >= len(OBJECTS)
    parameters = list(build(config).parameters())
    assert parameters and all(p.device.type == "meta" for p in parameters)
    config.optimizer.build()(parameters)


def same(ours: object, theirs: object) -> bool:
    """Compares class and parts: of partials, of plain containers, of objects by what they hold."""
    if isinstance(ours, partial):
        return isinstance(theirs, partial) and ours.func is theirs.func and same(ours.keywords, theirs.keywords)
    if isinstance(ours, torch.Tensor):
        return ours.shape == theirs.shape
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if type(ours) is type(theirs) and hasattr(ours, "__dict__"):
        return same(vars(ours), vars(theirs))
    return type(ours) is type(theirs) and (ours == theirs or callable(ours))


@pytest.mark.parametrize("chosen", ["model=qwen3_next_tiny", "curriculum=grow_linear"])
def test_objects_are_those_that_hydra_builds(chosen):
    with torch.device("meta"):
        for node in nodes(composed([chosen]).to_dict()):
            assert same(construct(node), instantiate(node, _convert_="all")), node["_target_"]
            assert not node.get("blocks") or not same(
                construct(node), instantiate({**node, "dim": 32}, _convert_="all")
            )


def test_the_default_model_has_the_size_that_it_is_said_to_have():
    assert 4e6 < sum(p.numel() for p in build(composed([])).parameters()) < 6e6


def test_every_registered_class_has_its_yaml_and_every_transport_its_name():
    known = files.groups()
    assert known["mixer"] == sorted(MIXERS)
    assert known["scheduler"] == sorted(SCHEDULERS) and known["engine"] == sorted(ENGINES)
    for kind, named in TRANSPORTS.items():
        for name in named:
            composed([f"parallel.transport.{kind}={name}"])


@cache
def _with_types(path: Path) -> object:
    """A file as Hydra reads it, not as text."""
    return OmegaConf.to_container(OmegaConf.load(path))


def unlike() -> list[Path]:
    """The files with a list of defaults, and one file of each group: the others are composed as that one is."""
    first = {file.parts[0]: file for file in reversed(FILES)}
    return [f for f in FILES if f in first.values() or "defaults:" in (CONF / f"{f}.yaml").read_text()]


@pytest.mark.parametrize("several", [(), *together(unlike())], ids=lambda several: " ".join(map(str, several)))
def test_plain_reading_of_the_files_says_what_hydra_composes(several, monkeypatch):
    """`launch.config.files`, which completion and help read, against Hydra: the same keys, the same values."""
    monkeypatch.setattr(files, "_load", lambda path: copy.deepcopy(_with_types(path)))
    monkeypatch.setattr(files, "_written", files._written.__wrapped__)  # no other test may have what this one reads
    chosen = [overrides_for(file)[0] for file in several]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        theirs = OmegaConf.to_container(compose("train", chosen), resolve=False)
    choices = dict(each.split("=", 1) for each in chosen)
    ours, placed = files.written(choices)
    assert ours == theirs
    assert choices.items() <= placed.items()


GLA = "model.blocks.gla"
TOGETHER = [  # options and values in one command line, in any order
    ["optimizer.lr=1e-3", "optimizer=muon", "optimizer.lr=2e-3", "seed=3"],
    ["model=mamba2_tiny", "model.dim=64", "~train.guard"],
    [f"{GLA}.mixer.heads=2", f"mixer@{GLA}.mixer=gla", f"+{GLA}.mixer.gate_low_rank=8"],
    ["experiment=smoke", "train={steps: 3}", "++run.name=x"],
    ["schedule.warmup=0.1", "schedule=cosine"],
]


@pytest.mark.parametrize("overrides", TOGETHER, ids=" ".join)
def test_options_before_values_are_what_hydra_composes_at_once(overrides):
    """`composed` keeps what a choice of options composes, and sets values in a copy of it."""
    read = [composing._read(text) for text in overrides]
    for _ in range(2):  # the second from the copy that the first left
        with initialize_config_dir(str(CONF), version_base="1.3"):
            try:
                theirs = OmegaConf.to_container(compose("train", overrides))
            except Exception as error:
                with pytest.raises(type(error)) as ours:
                    composing._hydra([], overrides, read)
                assert str(ours.value) == str(error)
                continue
        assert OmegaConf.to_container(composing._hydra([], overrides, read)) == theirs


def test_an_edited_or_new_file_is_seen_by_the_process_that_read_the_old_one(tmp_path, monkeypatch):
    conf = Path(shutil.copytree(CONF, tmp_path / "conf"))
    monkeypatch.setattr(files, "CONF", conf)
    monkeypatch.setattr(composing, "CONF", conf)
    before = composed([]).optimizer["lr"]
    assert composed([]).optimizer["lr"] == before
    file = conf / "optimizer" / f"{files.defaults()['optimizer']}.yaml"
    text, times = file.read_text(), file.stat()
    written = next(line for line in text.splitlines() if line.startswith("lr:")).split()[1]
    assert float(written) == before
    file.write_text(text.replace(f"lr: {written}", "lr: 7e-4"))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    assert composed([]).optimizer["lr"] == 7e-4
    assert files.written()[0]["optimizer"]["lr"] == "7e-4"
    (conf / "optimizer" / "mine.yaml").write_text(text.replace(f"lr: {written}", "lr: 5e-4"))
    assert "mine" in files.groups()["optimizer"] and composed(["optimizer=mine"]).optimizer["lr"] == 5e-4


def test_changing_a_configuration_changes_no_later_one():
    config = composed([])
    config.model["blocks"]["gla"]["mixer"].clear()
    files.written()[0]["model"]["blocks"].clear()
    assert composed([]).model["blocks"]["gla"]["mixer"] and files.written()[0]["model"]["blocks"]["gla"]
