"""docs/configuration.md is what the constructors and conf/ say now; and what makes it so."""

import re
from typing import get_args

import pytest

from data.corpora.corpus import CORPORA, CorpusName
from data.samplers import PACKINGS, PackingName
from launch.config import files, reference
from launch.config.choices import accepts, nested, parameters
from launch.config.reference import HUB, PAGE, documentation, hub_page, meanings, page
from models.hub import ARCHITECTURES
from models.mixers import gla, lightning, linear
from models.mixers.gla import GatedFeature
from models.mixers.lightning import RateRule
from models.mixers.linear import LinearFeature
from models.router import ROUTERS, RouterName
from parallel.sequence import TRANSPORTS
from train.parallel_settings import AttentionTransportName, StateTransportName


@pytest.fixture(scope="module")
def text():
    return page()


def test_the_committed_page_is_current(text):
    assert PAGE.exists(), "docs/configuration.md is missing: make reference"
    assert PAGE.read_text(encoding="utf-8") == text, (
        "docs/configuration.md is not current: make reference, and commit it"
    )


def test_the_table_of_architectures_is_current():
    text = HUB.read_text(encoding="utf-8")
    assert hub_page(text) == text, "docs/hub.md is not current: make reference, and commit it"
    assert all(f"| `{name}` |" in text for name in ARCHITECTURES)


@pytest.mark.slow
def test_it_is_the_same_twice_and_names_no_machine(text):
    assert page() == text
    assert str(reference.ROOT) not in text and "object at 0x" not in text and "<" not in text.replace("<!--", "")


def test_every_option_and_every_key_of_the_files_is_there(text):
    for group, options in files.groups().items():
        for option in options:
            assert f"`{group}={option}`" in text, f"conf/{group}/{option}.yaml"
    for key in files.leaves(files.written()[0]):
        name = key.rpartition(".")[2]
        if not name.startswith("_"):
            assert f"| `{key}` |" in text or f"| `{name}` |" in text, key


def test_every_key_has_a_meaning(text):
    empty, title = [], ""
    for line in text.splitlines():
        title = line.lstrip("# ") if line.startswith("#") else title
        if line.startswith("| `") and not re.split(r"(?<!\\)\|", line)[4].strip():
            empty.append(f"{line.split('`')[1]} ({title})")
    assert not empty, (
        f"no meaning: {', '.join(empty)}; say it in the class's docstring, as 'key: meaning.', "
        "or behind the # of its line in conf/"
    )


def test_papers_are_linked_by_their_numbers(text):
    assert re.search(r"\[\d{4}\.\d{5}\]\(https://arxiv\.org/abs/\d{4}\.\d{5}\)", text)
    assert not re.findall(r"(?<![\[/])\b\d{4}\.\d{5}\b", text)


def test_every_table_is_one(text):
    for line in text.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 5, line


def test_its_links_lead_somewhere(text):
    for target in re.findall(r"\]\((?!https:)([^)#]+)\)", text):
        assert (PAGE.parent / target).exists(), target
    titles = {re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in re.findall(r"^## (.*)$", text, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) == titles


def test_a_class_without_a_docstring_is_named():
    class Silent:
        def __init__(self, *, a: int): ...

    with pytest.raises(ValueError, match=r"Silent has no docstring: docs/configuration.md is written from it"):
        documentation(Silent)


STYLES = {
    "running": (
        """What it is. `a` stands in the text.

        a: the first: of all; b too. b, c: two
        of a kind, e.g. 1: 2. Nothing else: this is c's. Raises ValueError for what is wrong.""",
        "What it is. `a` stands in the text.",
        {"a": "the first: of all; b too", "b": "two of a kind, e.g. 1: 2. Nothing else: this is c's"},
    ),
    "columns": (
        """What it is.

        a     of it. auto: what it
              is
        b, c  two blanks

        Besides.""",
        "What it is.\n\nBesides.",
        {"a": "of it. auto: what it is", "c": "two blanks"},
    ),
    "first": ("""a: at once; or

        else later. b: last.""", "", {"a": "at once; or else later", "b": "last"}),
    "shapes": (
        """What it is. a: the first.

        x [B, T, D] -> [B, T, D], and more
        of that.""",
        "What it is.",
        {"a": "the first"},
    ),
    "prose": ("""Only prose, with d: a key of another.""", "Only prose, with d: a key of another.", {}),
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_meanings_are_found_in_a_docstring_and_nothing_else_is_lost(style):
    docstring, prose, found = STYLES[style]
    rest, said = meanings(docstring, ["a", "b", "c"])
    assert rest == prose and found.items() <= said.items()


def test_accepted_values_are_read_from_the_source():
    assert accepts("train.settings.ClusterSettings", "device") == ["auto", "cpu", "cuda"]  # a hint beside it
    assert accepts("train.engines.FSDP", "recompute") == [
        "none",
        "full",
        "selective",
        "planned",
    ]  # one that is imported
    assert accepts("train.parallel_settings.TransportSettings", "attention") == ["gather", "ring", "ulysses", "usp"]
    assert accepts("data.Data", "corpus")[:2] == ["stdlib", "text"]  # or null
    assert accepts("data.Data", "on_error") == ["stop", "skip"]
    assert "offline" in accepts("train.tracking.Tracking", "mode")  # a class that its package hands on
    assert accepts("train.settings.TrainSettings", "tokens") == accepts("torch.optim.AdamW", "lr") == []
    hints = {"recurrence": "StateTransportName", "attention": "AttentionTransportName", "blocks": "int"}
    hints |= {"experts": "ExpertTransportName", "keys": "KeyFormatName"}
    assert parameters("train.parallel_settings.TransportSettings") == hints
    assert parameters("no.such.Module") == {}
    assert (
        nested("train.parallel_settings.ParallelSettings", "transport") == "train.parallel_settings.TransportSettings"
    )
    assert nested("train.parallel_settings.ParallelSettings", "data") is None


@pytest.mark.parametrize(
    "hint, registry",
    [
        (CorpusName, CORPORA),
        (PackingName, PACKINGS),
        (RouterName, ROUTERS),
        (GatedFeature, gla.FEATURES),
        (LinearFeature, linear.FEATURES),
        (RateRule, lightning.RATES),
        (StateTransportName, TRANSPORTS["recurrence"]),
        (AttentionTransportName, TRANSPORTS["attention"]),
    ],
)
def test_a_hint_names_all_that_its_registry_has(hint, registry):
    assert list(get_args(hint)) == list(registry)


def test_comments_are_read_from_the_files(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(
        "# @package _global_\n# What it is,\n# in two lines.\n\na: 1 # one\nb:\n  c: ' ' # two # three\n  d: 2\n"
    )
    assert files.head_comment(file) == "What it is, in two lines."
    assert files.comments(file) == {"a": "one", "b.c": "two # three"}
