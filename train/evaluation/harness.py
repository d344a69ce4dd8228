"""`lm-eval`, where it is installed: its tasks ask a model of ours.

The first rank runs the harness and tells the others what each call asks, so that they take part in it: sequences are
spread over all ranks as everywhere here. Texts are decoded by every rank alike.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from data.roles import roles_of
from data.tokenizer import writer
from models.lm import LM
from train.evaluation.score import Scorer
from train.evaluation.texts import packed
from train.inference.decode import Decoder, Sampling
from train.inference.stop_strings import StreamedText
from train.settings import EvaluateSettings

MISSING = "needs the lm-eval package, which is not installed (pip install lm-eval)"
GENERATED = 256  # tokens of an answer, where a task does not say


class Answers:
    """Answers the harness's requests about texts. length: the most tokens of a text and its continuation; older ones
    go."""

    def __init__(self, model: LM, scorer: Scorer, tokenizer: Any, length: int):
        self.decoder, self.scorer, self.tokenizer, self.length = Decoder(model), scorer, tokenizer, length
        self.roles = roles_of(tokenizer)

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """Each (context, continuation)'s answer: the log-probability of the latter, and whether it is the likeliest
        text.

        As the harness has it, a blank between the two belongs to the continuation, and that is what the tokens of both
        together have more than those of the context.
        """
        examples, counts = [], []
        for context, continuation in pairs:
            stem = context.rstrip()
            whole = self._tokens(context + continuation)
            after = whole[len(self._tokens(stem)) :][1 - self.length :]
            before = self.roles.begin if context else self.roles.entry
            tokens = [*before, *whole][-self.length :]
            counts.append(min(len(after), len(tokens) - 1))  # nothing predicts a first token
            examples.append(packed(tokens, slice(len(tokens) - counts[-1] - 1, len(tokens) - 1)))
        answers = []
        for example, count, score in zip(examples, counts, self.scorer(examples), strict=True):
            at = slice(len(example.tokens) - count - 1, len(example.tokens) - 1)
            answers.append((-float(score.nats[at].sum()), bool(score.right[at].all())))
        return answers

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each text, in stretches of at most `length` tokens, each entered with nothing."""
        examples, owners = [], []
        for number, text in enumerate(texts):
            tokens = self._tokens(text)
            room = self.length - max(len(self.roles.entry), 1)
            for begin in range(0, len(tokens), room):
                examples.append(packed([*self.roles.entry, *tokens[begin : begin + room]]))
                owners.append(number)
        sums = [0.0] * len(texts)
        for owner, score in zip(owners, self.scorer(examples), strict=True):
            sums[owner] -= float(score.nats.sum())
        return sums

    def continuations(self, requests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """Writes the text that follows each (context, options), up to the first of the stops in `until`."""
        texts = []
        for context, options in requests:
            until = options.get("until") or []
            text = StreamedText([until] if isinstance(until, str) else [stop for stop in until if stop])
            count = int(options.get("max_gen_toks", GENERATED))
            sampled = bool(options.get("do_sample", False))
            sampling = Sampling(options.get("temperature") or 0.8 if sampled else 0, options.get("top_p") or 1.0)
            before = self.roles.begin if context else self.roles.entry
            tokens = [*before, *self._tokens(context)][-max(self.length - count, 1) :]
            parts: list[str] = []
            write = writer(self.tokenizer, tokens)

            def take(
                row: int, token: int, text: StreamedText = text, parts: list[str] = parts, write: Any = write
            ) -> bool:
                if token in self.roles.stop:
                    return False
                parts.append(text.add(write(token)))
                return not text.ended

            self.decoder.extend([self.decoder.read(tokens)], count, sampling, take)
            texts.append("".join(parts) + text.add(write.close()) + text.close())
        return texts

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer.encode(text.encode()).tolist() if text else []


def harness(
    model: LM,
    scorer: Scorer,
    tokenizer: Any,
    settings: EvaluateSettings,
    length: int,
    tell: Callable[[str, int, int], None],
) -> dict[str, Any]:
    """The results of the tasks by name, {} on ranks but the first. Collective."""
    answers = Answers(model, scorer, tokenizer, length)
    if dist.get_rank() != 0:
        while (call := _told(None)) is not None:
            getattr(answers, call[0])(call[1])
        return {}

    def ask(name: str, requests: list[Any]) -> Any:
        tell("tasks", 0, 1)
        _told((name, requests))
        replies = getattr(answers, name)(requests)
        tell("tasks", 1, 1)
        return replies

    try:
        import lm_eval

        results = lm_eval.simple_evaluate(model=_adapter(ask), tasks=list(settings.tasks), limit=settings.limit)
    finally:
        _told(None)
    return {task: _plain(numbers) for task, numbers in results["results"].items()}


def _told(call: Any) -> Any:
    """Returns what the first rank tells."""
    box = [call]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _adapter(ask: Callable[[str, list[Any]], Any]) -> Any:
    """An `lm_eval.api.model.LM` that hands on what it is asked."""
    import lm_eval.api.model

    class Farspan(lm_eval.api.model.LM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return ask("likelihoods", [tuple(request.args[:2]) for request in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            return ask("rolling", [request.args[0] for request in requests])

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return ask("continuations", [tuple(request.args[:2]) for request in requests])

    return Farspan()


def _plain(numbers: dict[str, Any]) -> dict[str, Any]:
    """Returns what JSON can hold."""
    return {key: value for key, value in numbers.items() if isinstance(value, bool | int | float | str)}
