"""What the lm-eval harness asks, held to a plain loop; the harness is a stand-in with its interface."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from data.tokenizer import Bytes
from models.axes import initialise
from models.block import Block
from models.ffn import SwiGLU
from models.lm import LM
from models.mixers import MIXERS
from models.sequence import Whole
from train.settings import EvaluateSettings

pytestmark = pytest.mark.dist
PAIRS = [("the cat ", "sat"), ("", "alone"), ("a", " b c"), ("x" * 60, "yz")]
LENGTH = 40


def bytes_model() -> LM:
    from functools import partial

    def block(**given):
        return Block(mixer=partial(MIXERS["gla"], heads=2), ffn=partial(SwiGLU, hidden=24), **given)

    model = LM(vocabulary=257, dim=16, layers=2, pattern=["layer"], blocks={"layer": block})
    model.compute = torch.float64
    return initialise(model.double(), seed=1)


def stand_in(calls):
    """A module like lm_eval: `simple_evaluate` asks the model, as a task would."""
    package, api, module = ModuleType("lm_eval"), ModuleType("lm_eval.api"), ModuleType("lm_eval.api.model")
    module.LM = type("LM", (), {})  # type: ignore[attr-defined]
    package.api, api.model = api, module  # type: ignore[attr-defined]

    def simple_evaluate(*, model, tasks, limit):
        assert isinstance(model, module.LM) and tasks == ["some_task"] and limit == 3  # type: ignore[attr-defined]

        def requests(*arguments):
            return [SimpleNamespace(args=each) for each in arguments]

        calls["likelihoods"] = model.loglikelihood(requests(*PAIRS))
        calls["rolling"] = model.loglikelihood_rolling(requests(("a text of more than one window " * 3,), ("b",)))
        stops = {"until": ["\n"], "max_gen_toks": 5}
        calls["continuations"] = model.generate_until(requests(("the", stops), ("q", {**stops, "until": "zzz"})))
        return {"results": {"some_task": {"acc,none": 0.5, "alias": "some_task", "samples": [1]}}}

    package.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    return {"lm_eval": package, "lm_eval.api": api, "lm_eval.api.model": module}


def asked():
    """On a rank: what the harness returned and was told."""
    from parallel.mesh import Groups
    from parallel.sequence.attention import GatherKeys
    from parallel.sequence.states import GatherEffects
    from train.evaluation.harness import harness
    from train.evaluation.score import Scorer
    from train.execute import Executor

    groups, calls, told = Groups(), {}, []
    if groups.rank == 0:
        sys.modules.update(stand_in(calls))
    model = bytes_model()
    executor = Executor(model, groups, torch.device("cpu"), GatherEffects(), GatherKeys(), 0.0)
    settings = EvaluateSettings(tasks=["some_task"], limit=3)
    scorer = Scorer(executor, 1, groups.world)
    found = harness(model, scorer, Bytes(), settings, LENGTH, lambda *given: told.append(given))
    return found, calls, told


def logprobs(model, tokens):
    """Of each token but the first, and the likeliest ones."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), Whole.of(torch.arange(len(tokens))[None])).logits[0, :-1]
    rows = logits.log_softmax(-1)
    return rows.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0], rows.argmax(-1).tolist()


@pytest.mark.parametrize("world", [1, 2])
def test_the_harness_is_answered_by_all_ranks_as_by_a_plain_loop(run, world):
    (found, calls, told), *others = run(world, asked)
    assert found == {"some_task": {"acc,none": 0.5, "alias": "some_task"}} and all(o[0] == {} for o in others)
    assert told[0] == ("tasks", 0, 1)
    model = bytes_model()
    for (context, continuation), (nats, greedy) in zip(PAIRS, calls["likelihoods"], strict=True):
        count = len(continuation) + len(context) - len(context.rstrip())
        tokens = [Bytes.DOCUMENT, *(context + continuation).encode()][-LENGTH:]
        each, likeliest = logprobs(model, tokens)
        assert nats == pytest.approx(float(each[-count:].sum()), rel=1e-9)
        assert greedy == (likeliest[-count:] == tokens[-count:])
    text = ("a text of more than one window " * 3).encode()
    want = 0.0
    for begin in range(0, len(text), LENGTH - 1):
        want += float(logprobs(model, [Bytes.DOCUMENT, *text[begin : begin + LENGTH - 1]])[0].sum())
    assert calls["rolling"][0] == pytest.approx(want, rel=1e-9)
    for prompt, stop, got in zip(("the", "q"), ("\n", "zzz"), calls["continuations"], strict=True):
        tokens = [Bytes.DOCUMENT, *prompt.encode()]
        written = b""
        for _ in range(5):
            token = logprobs(model, [*tokens, 0])[1][-1]
            if token == Bytes.DOCUMENT:
                break
            tokens.append(token)
            written += bytes([token])
        assert got == written.decode("utf-8", "replace").partition(stop)[0]
