"""`farspan generate` as a user meets it: prompts, stops, several processes, and mistakes that cost one line."""

import json
import shutil

import pytest

from launch.cli import main
from launch.commands.generate import ContinuationPrinter, _parse
from tests.launch.test_cli import finish, overrides, start

RATES = ["temperature=0.7", "top_p=0.9", "tokens=40", "seed=3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps, of every kind of layer."""
    place = tmp_path_factory.mktemp("generate")
    given = overrides(place, "cluster.workers=1", f"run.dir={place / 'run'}", "train.steps=2")
    finish(start(place, "train", *given))
    return place / "run"


@pytest.mark.e2e
def test_prompts_together_are_each_what_they_are_alone_on_one_process_or_two(run, capsys):
    def say(*arguments):
        assert main(["generate", str(run), *arguments, *RATES]) == 0
        return capsys.readouterr().out

    prompts = ["alpha beta " * 9, "x", "gamma = (x)\n"]
    together = say(*(f"prompt={p}" for p in prompts))
    texts = [block.partition("\n")[2].removesuffix("\n") for block in together.split("--- ")[1:]]
    assert [say(f"prompt={p}") for p in prompts[1:]] == [f"{text}\n" for text in texts[1:]]
    (run.parent / "long.txt").write_text(prompts[0])
    given = ["prompt_file=long.txt", *RATES, "cluster.workers=2"]
    said = finish(start(run.parent, "generate", str(run), *given))
    assert said.startswith(f"{texts[0]}\nthe longest prompt has 100 tokens and 40 may follow") and said.endswith(
        " to it\n"
    )
    continuation = texts[0].removeprefix(prompts[0])
    assert len(continuation) > 10
    stop = continuation[7:10]
    ended = say(f"prompt={prompts[0]}", f"stop={json.dumps(['never', stop])}")
    assert ended == f"{prompts[0]}{continuation[: continuation.index(stop)]}\n"


@pytest.mark.e2e
def test_samples_of_a_prompt_part_and_a_long_prompt_is_said(run, capsys):
    def say(*arguments):
        assert main(["generate", str(run), "prompt=alpha ", "tokens=12", *arguments]) == 0
        return capsys.readouterr()

    said = say("samples=3", "temperature=1").out.split("--- ")[1:]
    texts = [text.partition("\n")[2] for text in said]
    assert [text.partition("\n")[0] for text in said] == ["1 of 3", "2 of 3", "3 of 3"] and len(set(texts)) == 3
    assert say("temperature=1").out == texts[0]
    assert say("seed=2", "temperature=1").out == texts[2]
    assert say("temperature=1e-45").out == say("temperature=0").out
    assert not say("temperature=0").err
    beyond = "the longest prompt has 7 tokens and 90 may follow: the model was trained on texts of at most 96, and"
    assert say("tokens=90").err.startswith(beyond)


@pytest.mark.e2e
def test_what_is_wrong_costs_one_line(run, capsys):
    for arguments, said in {
        ("temperature=-1",): "temperature=-1: must not be negative",
        ("top_p=0",): "top_p=0: must be above 0 and at most 1",
        ("top_p=1.01",): "top_p=1.01: must be above 0 and at most 1",
        ("stop=",): "stop=: must not be empty",
        ('stop=["a',): 'stop=["a: must be a text, or a list',
        ("tokens=0",): "tokens=0: must be at least 1",
        ("tokens=2.5",): "tokens=2.5: expected a whole number",
        ("top-p=0.5",): "top-p: no such key; nearest: top_p",
        ("generate.temperature=x",): "temperature=x: expected a number",
        ("temperature=null",): "temperature=null: expected a number",
        ("temperature=1e400",): "temperature=inf: expected a number that is finite",
        ("seed=" + 23 * "9",): f"seed={23 * '9'}: expected a whole number, of at most 64 bits",
        ("seed=" + 5000 * "9",): "seed=9999",
        ("samples=0",): "samples=0: must be at least 1",
        ("cluster.workers=x",): "cluster.workers=x: expected a whole number",
        ("prompt_file=.",): "prompt_file=.: cannot be read",
        ("prompt_file=nowhere",): "prompt_file=nowhere: cannot be read",
        ("cluster.workers=0",): "cluster.workers=0: must be at least 1",
    }.items():
        assert main(["generate", str(run), *arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"farspan generate: {said}") and err.count("\n") == 1, err


@pytest.mark.e2e
def test_a_prompt_that_the_tokenizer_cannot_encode_costs_one_line(run, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers

    from data.tokenizer import Given, Json

    backend = Tokenizer(models.WordLevel({"alpha": 0, "beta": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    (checkpoint,) = (run / "checkpoints").iterdir()
    copy = run.parent / "other"
    shutil.copytree(checkpoint, copy)
    for card, prompt, said in [
        (Json(backend.to_str()).card(), "alpha ж", "prompt=alpha ж: the tokenizer has no token for ж"),
        (Json(backend.to_str()).card(), "alpha \udcff", "prompt=alpha \ufffd: is no UTF-8 text (byte 6)"),
        (Given(5, None).card(), "alpha", "prompt=alpha: tokenizer=ids: what the tokens spell is not known"),
        (
            {"name": "symbols", "size": 5, "special": {"document": 0}},
            "a",
            f"RUN={copy}: tokenizer=symbols: the symbols",
        ),
    ]:
        (copy / "tokenizer.json").write_text(json.dumps(card))
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["files"].pop("tokenizer.json", None)
        (copy / "manifest.json").write_text(json.dumps(manifest))
        assert main(["generate", str(copy), f"prompt={prompt}"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"farspan generate: {said}") and err.count("\n") == 1, err


def test_stops_are_texts_or_lists_of_them():
    assert _parse(["runs/x", r"stop=\n\n", 'stop=["a", "\\n"]', "stop=it's"])[1].stop == ["\n\n", "a", "\n", "it's"]
    assert _parse(["runs/x", 'stop=say "x"', "stop=\n"])[1].stop == ['say "x"', "\n"]


def test_of_several_texts_each_is_written_whole_and_in_turn(capsys):
    class Letters:
        DOCUMENT = 0

        def decode(self, tokens):
            return bytes(tokens)

    shown = ContinuationPrinter([b"p", b"q", b"r"], Letters(), ["!!"])
    assert shown.take(0, ord("a")) and shown.take(1, ord("b")) and shown.take(2, ord("c"))
    assert capsys.readouterr().out == "--- 1 of 3\npa"
    assert shown.take(1, ord("!")) and not shown.take(1, ord("!")) and not shown.take(0, 0)
    assert capsys.readouterr().out == "\n--- 2 of 3\nqb\n--- 3 of 3\nrc"
    shown.close()
    assert capsys.readouterr().out == "\n"
