"""Overrides: each is accepted for what it means, or costs one line that names the key and says what is accepted."""

import re

import pytest
import yaml

from launch.cli import main
from launch.config import files
from launch.config.compose import composed, fields
from launch.config.validate import words
from launch.verbs import VERBS, usage

pytestmark = pytest.mark.composes

NAMED = {group: ", ".join(options) for group, options in files.groups().items()}

GLA = "model.blocks.gla"
TRANSPORT = "parallel.transport"

# One override, or several, and what the line must say. Every line is one line, and names the key.
REFUSED = {
    # keys, at every depth, with and without Hydra's prefixes
    "tokens=3": "tokens: no such key; nearest: train.tokens",
    "lr=1e-3": "lr: no such key; nearest: optimizer.lr",
    "train.lr=1e-3": "train.lr: no such key; nearest: optimizer.lr",
    "train.tokns=3": "train.tokns: no such key; nearest: train.tokens",
    "Train.tokens=3": "Train.tokens: no such key; nearest: train.tokens",
    "TRAIN=3": "TRAIN: no such key; nearest: train",
    "+foo=3": "foo: no such key; accepts cluster, convert, cost, curriculum, data,",
    "++foo.bar=3": "foo: no such key; accepts cluster, convert, cost, curriculum, data,",
    "süd=3": "süd: no such key",
    f"{TRANSPORT}.recurence=gather": f"{TRANSPORT}.recurence: no such key; nearest: {TRANSPORT}.recurrence",
    f"+{TRANSPORT}.foo=1": f"{TRANSPORT}.foo: no such key; accepts attention, blocks, experts, keys, recurrence",
    f"{TRANSPORT}={{recurence: gather}}": f"{TRANSPORT}.recurence: no such key; nearest: {TRANSPORT}.recurrence",
    f"{GLA}.mixer.heds=4": f"{GLA}.mixer.heds: no such key; nearest: {GLA}.mixer.heads",
    f"+{GLA}.mixer.heds=4": f"{GLA}.mixer.heds: no such key; nearest: {GLA}.mixer.heads",
    f"++{GLA}.ffn.topk=3": f"{GLA}.ffn.topk: no such key; nearest: {GLA}.ffn.top_k",
    "model.heads=4": f"model.heads: no such key; nearest: {GLA}.mixer.heads, ",
    "model.blocks.gdn.ffn.hidden=64": "model.blocks.gdn.ffn is ${..gla.ffn}, the same as another; change that one",
    f"{GLA}.mixer.dim=3": f"{GLA}.mixer.dim: not a setting: the program gives it; accepts heads,",
    "+optimizer.params=3": "optimizer.params: not a setting",
    "+train._target_=os.system": "train._target_: no such key",
    "+model._args_=[1]": "model._args_: no such key",
    "~foo": "~foo: no such key",
    "~model.dmi": "~model.dmi: no such key; nearest: model.dim",
    "train/tokens=3": "train/tokens is no group; nearest: train.tokens",
    # numbers that nothing can be computed with
    "optimizer.lr=inf": "optimizer.lr=inf: expected a number that is finite",
    "optimizer.weight_decay=1e400": "optimizer.weight_decay=inf: expected a number that is finite",
    "optimizer.betas=[0.9,inf]": "optimizer.betas[1]=inf: expected a number that is finite",
    "train.guard.sigma=-inf": "train.guard.sigma=-inf: expected a number that is finite",
    "seed=99999999999999999999999": "seed=99999999999999999999999: expected a whole number, of at most 64 bits",
    "train.tokens=1e19": "train.tokens=1e+19: expected a whole number, of at most 64 bits",
    "model.dim=" + 5000 * "1": "model.dim=1111",
    # names and paths that no folder can have
    "run.name=../evil": "run.name='../evil': must be a name",
    "run.name=a/../../b": "run.name='a/../../b': must be a name",
    "run.name=/tmp/x": "run.name='/tmp/x': must be a name",
    "run.name=.": "run.name='.': must be a name",
    "run.name='a\nb'": "run.name='a\\nb': must be a name",
    f"run.name={300 * 'x'}": "must have at most 255 bytes",
    f"run.name={100 * 'ü'}{56 * 'x'}": "must have at most 255 bytes",
    f"run.dir=a/{300 * 'x'}": "a name in it may have 255 bytes",
    "resume=~nobody-here/x": "resume=~nobody-here/x: there is no user nobody-here with a home folder here",
    # hints, as they can be given
    "run.name=1e3": "run.name=1e3: expected text or null; as text: run.name=\"'1e3'\"",
    "data.path=[a]": "data.path=[a]: expected text or null; as text: data.path=\"'[a]'\"",
    "data.path=[a": "data.path=[a: not an override that can be read; expected key=value, text with blanks or = in "
    "quotes: data.path=\"'[a'\"",
    # what cannot be read
    "": "expected key=value",
    "=3": "=3: expected key=value",
    "+=3": "+=3: expected key=value",
    "~": "~: expected key=value",
    "@=3": "@=3: expected key=value",
    ".model=3": ".model=3: expected key=value; nearest: model",
    "seed: 3": "seed: 3: expected key=value; nearest: seed",
    "a..b=3": "a..b=3: not an override that can be read",
    "seed =3": "seed =3: not an override that can be read",
    "run.name='": "run.name=': not an override that can be read",
    "model.pattern[0]=gla": "model.pattern[0]=gla: not an override that can be read",
    "-1=3": "-1=3: no such option",
    "hydra.run.dir=x": "hydra.run.dir=x: Hydra's own settings are not used here; the run's folder is run.dir",
    "+hydra/launcher=x": "Hydra's own settings are not used",
    # values of another type, empty ones, null
    "seed=": "seed=: expected a value behind the =; null for none",
    "run.name=": "run.name=: expected a value behind the =; null for none",
    "seed=null": "seed=null: expected a whole number",
    "seed=true": "seed=true: expected a whole number",
    "seed=1.5": "seed=1.5: expected a whole number",
    "seed='4'": "seed='4': expected a whole number, without quotes",
    "seed==3": "seed==3: expected a whole number",
    "seed=inf": "seed=inf: expected a whole number",
    "train.clip=nan": "train.clip=nan: expected a number",
    "train.clip=null": "train.clip=null: expected a number",
    "run.name=3": "run.name=3: expected text or null; as text: run.name=\"'3'\"",
    "run.name=[a]": "run.name=[a]: expected text or null",
    "run.name={a: b}": "run.name={a: b}: expected text or null",
    "cluster.address={a: 3}": "cluster.address={a: 3}: expected text or null",
    "engine.reshard_after_forward=1": "engine.reshard_after_forward=1: expected true or false",
    "engine.reshard_after_forward=yes": "engine.reshard_after_forward=yes: expected true or false",
    "engine.reshard_after_forward='true'": "'true': expected true or false, without quotes",
    "optimizer.lr=true": "optimizer.lr=true: expected a number",
    "optimizer.lr=null": "optimizer.lr=null: expected a number",
    "optimizer.betas=0.9": "optimizer.betas=0.9: expected a list of 2 numbers",
    "optimizer.betas=[0.9]": "optimizer.betas=[0.9]: expected a list of 2 numbers",
    "optimizer.betas=[0.9,x]": "optimizer.betas[1]=x: expected a number",
    "model.pattern=gla": "model.pattern=gla: expected a list of texts; one is written [gla]",
    "model.pattern=[gla,3]": "model.pattern[1]=3: expected text",
    "model.pattern=[gla,{a: b}]": "model.pattern[1]={a: b}: expected text",
    "model.pattern=[[gla]]": "model.pattern[0]=[gla]: expected text",
    "model.pattern=[]": "model.pattern=[]: needs at least one block name",
    "model.pattern.9=attn": "model.pattern.9=attn: list index out of range",
    "train=3": "train=3: expected a section with keys",
    "train=null": "train=null: expected a section with keys",
    "parallel.transport=gather": "parallel.transport=gather: expected a section with keys",
    "parallel.transport=[gather]": "parallel.transport=[gather]: expected a section with keys",
    "parallel.transport.recurrence=null": "parallel.transport.recurrence=null: expected text",
    "model.blocks=[]": "model.blocks=[]: expected a section with keys",
    "model.blocks=3": "model.blocks=3: expected a section with keys",
    f"{GLA}.mixer=gla": f"{GLA}.mixer=gla: expected an object",
    f"{GLA}.mixer=3": f"{GLA}.mixer=3: expected an object, a section with _target_ or null",
    "model.blocks.new=3": "model.blocks.new",
    "+model.blocks.new=3": "model.blocks.new=3: expected an object",
    "+model.blocks.new.mixer.heads=3": "model.blocks.new._target_: missing",
    # values that a constructor refuses, with the nearest of those that it accepts
    "parallel.transport.recurrence=gathr": "gathr: must be one of allscan, auto, gather, relay; nearest: gather",
    "precision.compute=fp3": "precision.compute=fp3: must be one of auto, bf16, fp32, fp64; nearest: fp32",
    "cluster.kind=foo": "cluster.kind=foo: must be one of none, local, ray",
    "scheduler.layout=zigzga": "nearest: zigzag",
    "tracking.mode=onlin": "nearest: online",
    "train.tokens=-1": "train.tokens=-1: must be above 0",
    "data.heldout=1": "data.heldout=1.0: expected a fraction",
    f"{GLA}.mixer.heads=5": f"{GLA}.mixer.heads=5: must divide dim * expand_k=128",
    "optimizer.lr=-1.0": "optimizer: Invalid learning rate: -1.0",
    # groups, their options and their places
    "model=": f"model=: no such option; accepts {NAMED['model']}",
    "model=null": f"model=null: no such option; accepts {NAMED['model']}",
    "model=[a,b]": f"model=[a,b]: takes one option; accepts {NAMED['model']}",
    "model=linear_moe_tny": f"model=linear_moe_tny: no such option; accepts {NAMED['model']}; nearest: linear_moe_tiny",
    "data=3": f"data=3: no such option; accepts {NAMED['data']}",
    "data=/data/text": f"data=/data/text: no such option; accepts {NAMED['data']}; nearest: text",
    "model=../mixer/gla": "model=../mixer/gla: no such option",
    "experiment=smok": f"experiment=smok: no such option; accepts {NAMED['experiment']}, null; nearest: smoke",
    "~model": f"~model: a run needs one; accepts {NAMED['model']}",
    "~data=text": f"~data=text: a run needs one; accepts {NAMED['data']}",
    "~experiment=smoke": "~experiment=smoke: is not chosen",
    "mixer=gla": f"mixer=gla: where? for example mixer@{GLA}.mixer=gla",
    "mixr@model.blocks.gla.mixer=gla": "mixr is no group; nearest: mixer",
    "run@model=gla": "run is no group; accepts cluster, curriculum, data,",
    f"mixer@{GLA}.mixer=gated": f"mixer@{GLA}.mixer=gated: no such option; accepts attention, deltanet,",
    f"mixer@{GLA}.mixer=null": "null: no such option",
    f"mixer@{GLA}.mixer=[gla,attention]": "takes one option",
    "mixer@model.blocks.glaa.mixer=gla": f"there is no such place; nearest: mixer@{GLA}.mixer",
    "data@foo=text": "data@foo: there is no such place; nearest: data",
    "+mixer@model.foo=gla": "model.foo: no such key",
    f"~mixer@{GLA}.mixer": f"{GLA}.mixer._target_: missing",
    "data=text": "data.path: missing; give it as data.path=VALUE",
    # deletions
    "~seed": "seed: missing; a run needs it",
    "~train": "train: missing; a run needs it",
    "~model.dim": "model.dim: missing; give it as model.dim=VALUE",
    "~model._target_": "model._target_: missing",
    f"~{GLA}.mixer.heads": f"{GLA}.mixer.heads: missing; give it as",
    f"~{GLA}.mixer": f"{GLA}.mixer: missing",
    f"~{GLA}": "model.blocks.gdn.ffn=${..gla.ffn}: there is no gla.ffn",
    "~optimizer.lr": "optimizer.lr: missing; give it as optimizer.lr=VALUE",
    "~seed=3": "~seed=3: its value is 0",
    "~run.name": "~run.name: is null already",
    # interpolations
    "seed=${foo}": "seed=${foo}: there is no foo",
    "seed=${train.tokns}": "seed=${train.tokns}: there is no train.tokns; nearest: train.tokens",
    "seed=${oc.env:NO_SUCH_VARIABLE}": "'NO_SUCH_VARIABLE' not found",
    "seed=${nope:3}": "seed=${nope:3}: Unsupported interpolation type nope",
    "run.name=${run.name}": "Recursive interpolation",
    "run.name=${seed}": "run.name=0: expected text or null",
    "run.name=${": "run.name=${: not an override that can be read",
    # several values
    "optimizer.lr=1e-3,1e-4": "has several values: farspan sweep runs a job for each",
    "seed=range(1,4)": "has several values",
    "schedule=cosine,wsd": "has several values",
    # classes: ours and torch's optimizers, and nothing that can be reached through them
    "model._target_=os.system": "model._target_=os.system: must be a class of data., models.",
    "model._target_=models.lm.LMM": "model._target_=models.lm.LMM: no such class; nearest: models.lm.LM",
    "model._target_=models.nope.LM": "there is no module models.nope",
    "model._target_=models.lm": "model._target_=models.lm: no such class",
    "model._target_=data.loader.os.system": "there is no module data.loader.os",
    "data._target_=data.stores.store.build": "data._target_=data.stores.store.build: no such class",
    "model._target_=models.lm.nn.Linear": "there is no module models.lm.nn",
    "model._target_=3": "model._target_=3: must be a class",
    "+cluster.template={_target_: os.system}": "cluster.template._target_=os.system: must be a class of",
    "seed={_target_: data.Data}": "seed={_target_: data.Data}: expected a whole number",
    "optimizer._target_=torch.optim.AdamX": "no such class; nearest: torch.optim.Adam",
    "optimizer._target_=torch.optim.lr_scheduler.StepLR": "optimizer.lr: no such key",
    f"{GLA}.mixer._target_=train.schedules.WSD": "must be a torch.nn",
    "+model._partial_=true": "model._partial_: must be false",
    "optimizer._partial_=false": "optimizer._partial_: must be true",
    "optimizer._partial_=3": "optimizer._partial_=3: expected true or false",
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_mistake_costs_one_line(override, capsys):
    assert main(["train", "--cfg", override]) == 2
    said = capsys.readouterr()
    assert not said.out and len(said.err.splitlines()) == 1, said.err
    assert said.err.startswith("farspan train: ") and REFUSED[override] in said.err, said.err
    assert len(said.err) < 450


# Overrides, a key, and the value that it must have.
ACCEPTED = [
    (["train.tokens=1e6"], "train.tokens", 1_000_000),
    (["train.tokens=1_000"], "train.tokens", 1000),
    (["seed=int(3.5)"], "seed", 3),
    (["seed= 3"], "seed", 3),
    (["+seed=3"], "seed", 3),
    (["++seed=3"], "seed", 3),
    (["seed=1", "seed=2"], "seed", 2),
    (["~seed", "+seed=3"], "seed", 3),
    (["seed=${train.keep}"], "seed", 2),
    (["schedule.warmup=2000"], "schedule.warmup", 2000),
    (["schedule.decay=1.0"], "schedule.decay", 1.0),
    (["train.clip=1"], "train.clip", 1.0),
    (["train.steps=null"], "train.steps", None),
    (["train={tokens: 3}"], "train.keep", 2),
    (["~train.keep"], "train.keep", 2),  # the constructor's default
    (["~parallel.transport"], "parallel.transport.blocks", 4),
    (["~parallel.transport"], "parallel.transport.experts", "counted"),
    (["~engine.reshard_after_forward"], "engine.reshard_after_forward", True),
    (["tracking.tags=[a,b]"], "tracking.tags", ["a", "b"]),
    (["optimizer.amsgrad=true"], "optimizer.amsgrad", True),  # not in the file, but its class knows it
    (["optimizer._target_=torch.optim.AdamW", "optimizer.maximize=true"], "optimizer.maximize", True),
    (["optimizer.rates={vocab: 0.5}"], "optimizer.rates", {"vocab": 0.5}),
    (["optimizer=muon", "optimizer.adamw=[vocab,expert]"], "optimizer.adamw", ["vocab", "expert"]),
    (["cluster.address=http://HEAD:8265"], "cluster.address", "http://HEAD:8265"),
    (["run.name=ü"], "run.name", "ü"),
    (["run.name=a b"], "run.name", "a b"),
    (["run.name=a=b"], "run.name", "a=b"),
    (["run.name='3'"], "run.name", "3"),
    (["data=text", "data.path=~/some texts/日本 (1).txt"], "data.path", "~/some texts/日本 (1).txt"),
    (["experiment=smoke", "experiment=null"], "train.tokens", 720_000),
    (["~experiment"], "train.tokens", 720_000),
    (["+experiment=smoke"], "train.tokens", 60_000),
    (["experiment=[smoke,stdlib_long]"], "train.tokens", 5_000_000),
    (["data=text", "data=stdlib"], "data.corpus", "stdlib"),
    (["++schedule=cosine"], "schedule.floor", 0.1),
    ([f"+mixer@{GLA}.mixer=gated_deltanet"], f"{GLA}.mixer.expand_k", 1.0),
    (["model.pattern.0=attn"], "model.pattern", ["attn", "gdn", "gla", "attn"]),
    (["~model.blocks.gdn", "model.pattern=[gla,attn]"], "model.pattern", ["gla", "attn"]),
    (
        ["optimizer._target_=torch.optim.SGD", "~optimizer.betas", "~optimizer.eps", "optimizer.momentum=0.9"],
        "optimizer.momentum",
        0.9,
    ),
    (
        [
            "+mixer@model.blocks.new.mixer=gla",
            "model.blocks.new.mixer.heads=4",
            "+model.blocks.new._target_=models.Block",
            "+model.blocks.new._partial_=true",
            "+model.blocks.new.ffn=${..gla.ffn}",
            "model.pattern=[new,gla]",
        ],
        "model.blocks.new.mixer.heads",
        4,
    ),
]


@pytest.mark.parametrize(("overrides", "key", "value"), ACCEPTED)
def test_what_is_meant_is_accepted(overrides, key, value):
    found = composed(overrides).to_dict()
    for part in key.split("."):
        found = found[part]
    assert found == value and type(found) is type(value)


def test_a_configuration_is_complete():
    """What the files leave out is there with the constructors' defaults, so that a resumed run does not change."""
    config = composed([]).to_dict()
    assert config["cluster"]["address"] is None and "template" in config["cluster"]
    assert composed(["~scheduler.layout"]).scheduler.values == config["scheduler"]
    assert config["optimizer"]["no_decay"] is None and config["optimizer"]["fused"] == "auto"
    torchs = composed(["optimizer._target_=torch.optim.AdamW"]).to_dict()
    assert "amsgrad" not in torchs["optimizer"]  # torch's own change from release to release


def test_a_class_that_takes_any_key_is_its_own_judge():
    class Open:
        def __init__(self, *, a: int = 1, **more: str): ...

    assert fields("x", {"b": "c"}, Open) == {"b": "c", "a": 1}


@pytest.mark.parametrize(
    ("hint", "said"),
    [
        (int | None, "a whole number or null"),
        (int | float, "a number"),
        (list[str] | None, "a list of texts or null"),
        (tuple[float, float], "a list of 2 numbers"),
        (dict[str, int], "a section with keys"),
    ],
)
def test_types_in_words(hint, said):
    assert words(hint) == said


@pytest.mark.parametrize(
    "asked", [["--cfg"], ["--cfg", "job"], ["-c", "job"], ["--cfg=job"], ["--cfg", "job", "--resolve"]]
)
def test_cfg_prints_the_configuration_and_nothing_else(asked, capsys):
    assert main(["plan", "seed=7", *asked, "optimizer.lr=1e-4"]) == 0
    said = capsys.readouterr()
    assert yaml.safe_load(said.out)["seed"] == 7 and not said.err
    assert yaml.safe_load(said.out).keys() == composed([]).to_dict().keys()
    assert "${" not in said.out and "???" not in said.out


def test_cfg_of_other_verbs(capsys, tmp_path):
    assert main(["submit", "--cfg"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["cluster"]["kind"] == "ray"
    assert main(["sweep", "--cfg", "seed=1,2"]) == 0
    assert [each["seed"] for each in yaml.safe_load_all(capsys.readouterr().out)] == [1, 2]
    assert main(["sweep", "--cfg", "seed=1,x"]) == 2
    said = capsys.readouterr()
    assert not said.out and "seed=x: expected a whole number" in said.err
    assert main(["train", "--cfg", "hydra"]) == 2 and main(["train", "--cfg=all"]) == 2
    assert main(["doctor", "--cfg"]) == 2


def test_cfg_of_a_resumed_run(capsys, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(composed(["seed=5", "train.tokens=8192"]).to_dict()))
    assert main(["train", f"resume={tmp_path}", "--cfg", "train.tokens=16384"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["seed"] == 5 and config["train"]["tokens"] == 16384 and config["resume"] == str(tmp_path)


@pytest.mark.parametrize("name", VERBS)
def test_help(name, capsys):
    assert main([name, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"farspan {name} ") and max(map(len, said.splitlines())) <= 120
    assert f"  farspan {name} " in said or name == "completion"
    if VERBS[name].overrides:
        for group, options in files.groups().items():
            told = re.search(rf"^  {group}(=|@PLACE=) ((?:.*\n)(?: {{20}}.*\n)*)", said, re.MULTILINE)
            assert told and set(options) <= set(re.findall(r"\w+", told[2]))
        for part in ("seed=0", "tokens=720_000", "transport.attention=gather", "layers=4"):
            assert part in said
        assert said.rstrip().splitlines()[-1].startswith("docs/configuration.md")


def test_help_shows_the_keys_of_the_options_that_are_chosen(capsys):
    assert main(["train", "cluster=slurm", "data=text", "--help"]) == 0
    said = capsys.readouterr().out
    assert "template.nodes=2" in said and "corpus=text path=???" in said and "[slurm]" in said


def test_usage_is_one_screen_and_needs_no_verb_to_be_there(capsys, monkeypatch):
    monkeypatch.setattr("launch.verbs.import_module", None)
    for asked in ([], ["-h"], ["--help"], ["help"]):
        assert main(asked) == 0
        assert capsys.readouterr().out == usage()
    assert len(usage().splitlines()) <= 24 and max(map(len, usage().splitlines())) <= 110
    assert all(f"farspan {name}" in usage() for name in VERBS)
    assert main(["trian"]) == 2
    assert "trian: no such verb; accepts train, sweep" in capsys.readouterr().err
