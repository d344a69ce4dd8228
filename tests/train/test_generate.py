"""Decoding a token at a time gives what reading the whole text gives: every mixer, texts beside others, over ranks."""

import inspect
from functools import partial

import pytest
import torch

from models.axes import initialise
from models.block import Block
from models.decoding import PlacedKeys, TextRows
from models.lm import LM
from models.mixers import MIXERS
from models.moe import MoE
from models.sequence import Whole
from tests.models.test_mixers import MORE, NEEDED
from tests.parity import VOCABULARY, mixer_model, small_model
from train.inference import decode
from train.inference.decode import ALONE, Decoder, Sampling

CASES = [(name, {}) for name in sorted(MIXERS)] + [("attention", MORE["attention"][0]), ("attention", {"window": 5})]
LIKELIEST = Sampling(temperature=0)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))


def model_of(case, layers=2):
    name, options = case
    asked = inspect.signature(MIXERS[name]).parameters
    given = {key: value for key, value in NEEDED.items() if key in asked and key not in options}
    return ready(mixer_model(name, layers=layers, **given, **options))


def ready(model):
    """In fp64, every parameter moved from where it starts."""
    model = initialise(model.double(), seed=1)
    model.compute = torch.float64
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def text(length, seed=0):
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def parallel(model, tokens):
    """Logits [T, V] of one forward pass over the whole."""
    return model(torch.tensor([tokens]), Whole.of(torch.arange(len(tokens))[None])).logits[0]


def assert_equal(got, want):
    assert (got - want).norm() <= 1e-10 * want.norm()


@each_case
def test_step_by_step_equals_the_parallel_forward(case):
    """Two texts from their first token on; the first ends, and the other goes on alone."""
    model, texts = model_of(case), [text(24, seed=0), text(24, seed=1)]
    want, seq, rows = [parallel(model, tokens) for tokens in texts], TextRows({}, [0, 0]), [0, 1]
    with torch.no_grad():
        for t in range(24):
            if t == 15:
                rows = [1]
                seq.keep(rows)
            got = model(torch.tensor([[texts[row][t]] for row in rows]), seq).logits[:, 0]
            seq.advance()
            for logits, row in zip(got, rows, strict=True):
                assert_equal(logits, want[row][t])


@pytest.mark.parametrize("case", [("gla", {}), ("attention", {"window": 5, "sinks": 2}), ("mom", {})], ids=str)
def test_a_text_begins_with_nothing_where_another_has_stood(case):
    model, new, old = model_of(case), text(8, seed=2), text(12, seed=3)
    want, seq = [parallel(model, new), parallel(model, old)], TextRows({}, [0, 0])
    with torch.no_grad():
        for t in range(12):
            if t == 4:  # the first row begins again
                seq = TextRows(seq.held, [0, 4])
            got = model(torch.tensor([[new[t - 4] if t >= 4 else old[t]], [old[t]]]), seq).logits[:, 0]
            seq.advance()
            assert_equal(got[0], want[0][t - 4] if t >= 4 else want[1][t])
            assert_equal(got[1], want[1][t])


@each_case
def test_texts_decoded_together_equal_each_alone_and_the_forward_of_all_that_was_written(case):
    decoder = Decoder(model_of(case), span=7)
    texts, stops = [text(n, seed=n) for n in (3, 19, 1, 11)], [9, 4, 9, 1]
    written: list[list[int]] = [[] for _ in texts]

    def take(row, token):
        written[row].append(token)
        return len(written[row]) < stops[row]

    decoder.extend([decoder.read(tokens) for tokens in texts], 9, LIKELIEST, take)
    for tokens, found, stop in zip(texts, written, stops, strict=True):
        alone: list[int] = []
        decoder.extend([decoder.read(tokens)], stop, LIKELIEST, lambda row, token, alone=alone: not alone.append(token))
        assert found == alone and len(found) == stop
        want = parallel(decoder.model, tokens + found)[len(tokens) - 1 : -1]
        assert found == want.argmax(-1).tolist()


@pytest.mark.parametrize("options", [{}, {"window": 6}, {"window": 6, "sinks": 2}], ids=str)
def test_logits_of_rows_equal_those_of_each_text_alone(options):
    """Not only the likeliest token: with attention, its windows and sinks, a convolution, experts."""
    decoder = Decoder(ready(small_model(options)), span=5)
    texts = [text(n, seed=n) for n in (2, 17, 9)]
    seen: list[torch.Tensor] = []
    read = [decoder.read(tokens) for tokens in texts]
    heard = decoder.model.register_forward_hook(lambda m, a, out: seen.append(out.logits[:, -1]))
    tokens: list[list[int]] = [[] for _ in texts]
    decoder.extend(read, 8, LIKELIEST, lambda row, token: not tokens[row].append(token))
    heard.remove()
    for row, start in enumerate(texts):
        want = parallel(decoder.model, start + tokens[row][:-1])[len(start) :]
        assert_equal(torch.stack([logits[row] for logits in seen]), want)


@pytest.mark.parametrize(
    "broken", ["keys of all rows seen", "one place for all", "nothing remembered", "a ring too short"]
)
def test_what_breaks_decoding_together_is_caught(broken, monkeypatch):
    """Each on purpose: the comparison above has to see it."""
    options = {}
    if broken == "keys of all rows seen":
        monkeypatch.setattr(PlacedKeys, "count", lambda self, length: self.k.shape[2])
    elif broken == "one place for all":
        first = lambda held, lengths, device: TextRows(held, lengths[:1] * len(lengths), device)  # noqa: E731
        monkeypatch.setattr(decode, "TextRows", first)
    elif broken == "nothing remembered":
        monkeypatch.setattr(decode, "_joined", lambda entering: {})
    else:
        options, honest = {"window": 6, "sinks": 2}, PlacedKeys.place
        monkeypatch.setattr(PlacedKeys, "place", lambda self, position: min(honest(self, position), 6))
    with pytest.raises(AssertionError):
        test_logits_of_rows_equal_those_of_each_text_alone(options)


def test_the_memory_of_a_recurrent_model_does_not_grow():
    sizes = []
    for length in (40, 400):
        entering = Decoder(model_of(("gated_deltanet", {})), span=16).read(text(length)).entering
        sizes.append(sum(x.numel() for x in entering.values()))
    assert sizes[0] == sizes[1]
    held = Decoder(model_of(("attention", {"window": 5}))).read(text(100)).entering
    assert {value.k.shape[1] for value in held.values()} == {4}


def test_draws_follow_temperature_and_top_p():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()

    def counts(draws=1500, **options):
        sampling = Sampling(**options)
        generator = sampling.start()
        found = torch.tensor([sampling.draw(logits, generator) for _ in range(draws)])
        return torch.bincount(found, minlength=4) / draws

    torch.testing.assert_close(counts(temperature=1.0), logits.exp(), rtol=0, atol=0.03)
    cooler = logits.exp() ** 2
    torch.testing.assert_close(counts(temperature=0.5), cooler / cooler.sum(), rtol=0, atol=0.03)
    torch.testing.assert_close(
        counts(temperature=1.0, top_p=0.7), torch.tensor([2 / 3, 1 / 3, 0, 0]), rtol=0, atol=0.03
    )
    assert counts(50, temperature=1.0, top_p=0.5).tolist() == [1, 0, 0, 0]
    assert counts(50, temperature=0).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"temperature": float("nan")}]
)
def test_what_cannot_be_drawn_by_is_refused(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        Sampling(**options)


def spread(cases, lengths):
    """On each rank: what reading texts over all ranks leaves against reading them alone, as the largest difference."""
    from parallel.mesh import Groups

    groups = Groups()
    ranks = tuple(range(groups.world))
    groups.open([ranks])
    comm, worst = groups.comm(ranks), {}
    for case in cases:
        decoder = Decoder(ready(small_model(case)) if isinstance(case, dict) else model_of(case, layers=2), span=6)
        for length in lengths:
            tokens = text(length, seed=length)
            got, want = decoder.read(tokens, comm), decoder.read(tokens, ALONE)
            more = [logits_after(decoder, each, want.logits) for each in (got, want)]
            assert (got.logits is not None) == (comm.rank == comm.size - 1)
            pairs = [more] + ([[got.logits, want.logits]] if got.logits is not None else [])
            worst[str(case), length] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return worst


def logits_after(decoder, read, logits):
    """Of some tokens more, from what this rank holds."""
    found = []
    heard = decoder.model.register_forward_hook(lambda m, a, out: found.append(out.logits[:, -1]))
    start = type(read)(read.entering, read.tokens, logits)
    decoder.extend([start], 6, LIKELIEST, lambda row, token: True)
    heard.remove()
    return torch.cat(found)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_a_prompt_over_ranks_leaves_on_each_what_one_process_has(run, world):
    cases = [{}, {"window": 5}, {"window": 9, "sinks": 3}]
    for found in run(world, spread, cases, (1, 2, 13, 40)):
        assert max(found.values()) <= 1e-10, found


@pytest.mark.dist
def test_a_prompt_over_ranks_in_every_mixer(run):
    for found in run(2, spread, CASES, (23,), timeout=240):
        assert max(found.values()) <= 1e-10, found


def test_experts_decode_together_as_alone():
    block = partial(Block, mixer=partial(MIXERS["gla"], heads=2), ffn=partial(MoE, num_experts=4, top_k=2, hidden=12))
    decoder = Decoder(
        ready(LM(vocabulary=VOCABULARY, dim=16, layers=2, pattern=["layer"], blocks={"layer": block})), span=4
    )
    texts = [text(n, seed=n) for n in (5, 9)]
    written: list[list[int]] = [[], []]
    decoder.extend([decoder.read(t) for t in texts], 6, LIKELIEST, lambda row, token: not written[row].append(token))
    for tokens, found in zip(texts, written, strict=True):
        assert found == parallel(decoder.model, tokens + found)[len(tokens) - 1 : -1].argmax(-1).tolist()
