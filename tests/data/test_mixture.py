from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.batches import Batches
from data.curriculum import Curriculum
from data.loader import Data
from data.mixture import Mixture, Portion
from data.samplers.sampler import Source
from tests.data import prose, write
from tests.data.fake import Store, of

CHOSEN = {
    "packing": "concat",
    "max_length": 64,
    "min_length": 16,
    "overlong": "random",
    "document_mask": True,
    "heldout": 0.01,
    "heldout_tokens": 64,
}
SHORT, LONG = [20 + i % 60 for i in range(60)], [100 + 37 * i % 400 for i in range(60)]


def mixture(folder: Path, *, batch_tokens: int = 128, curriculum: Curriculum | None = None, **about: Any) -> Batches:
    """Of two sources, `a` of short and `b` of long documents; `a`, `b`: changes of each, the rest of the cut."""
    sources = [
        Source(name, Store(folder / name, [*lengths, 128]), **about.pop(name, {}))  # type: ignore[arg-type]
        for name, lengths in (("a", SHORT), ("b", LONG))
    ]
    return of(sources, batch_tokens, CHOSEN | about, curriculum)


def weight(*lines: tuple[int, int]) -> dict[str, Any]:
    return {"weight": tuple((token, Fraction(w)) for token, w in lines)}


def by_source(drawn: dict[str, int]) -> dict[str, int]:
    return {name: sum(t for part, t in drawn.items() if part.startswith(f"{name}/")) for name in "ab"}


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    packing=st.sampled_from(["concat", "best_fit", "decomposition"]),
    a=st.integers(1, 9),
    b=st.integers(1, 9),
    change=st.integers(0, 4000),
    odds=st.sampled_from(["uniform", "grow_p2"]),
)
def test_what_was_drawn_from_where_adds_up(
    tmp_path: Path, packing: str, a: int, b: int, change: int, odds: str
) -> None:
    curriculum = Curriculum(odds=odds if packing == "decomposition" else "uniform", cycles=2, tokens=5120)
    lines = weight((0, a), (change + 1, b))
    one = mixture(tmp_path, a=lines, b=weight((0, b)), packing=packing, curriculum=curriculum)
    seen: dict[str, int] = {}
    for step in range(60):
        assert {name: n for name, n in one.drawn(step).items() if n} == seen
        assert sum(seen.values()) == 128 * step
        for slot in one.slots(step):
            assert slot.index * slot.part.pool.length == seen.get(slot.part.name, 0)
            seen[slot.part.name] = seen.get(slot.part.name, 0) + slot.part.pool.length


@pytest.mark.parametrize("packing", ["concat", "best_fit", "decomposition"])
def test_sources_come_by_their_weights(tmp_path: Path, packing: str) -> None:
    found = by_source(mixture(tmp_path, a=weight((0, 3)), b=weight((0, 1)), packing=packing).drawn(4000))
    assert abs(found["a"] / 4000 / 128 - 0.75) < 0.005


def test_weights_change_over_tokens(tmp_path: Path) -> None:
    one = mixture(tmp_path, a=weight((0, 1)), b=weight((0, 0), (12_800, 1), (25_600, 3)))
    assert by_source(one.drawn(100)) == {"a": 12_800, "b": 0}
    assert by_source(one.drawn(200)) == {"a": 19_200, "b": 6_400}
    assert by_source(one.drawn(300)) == {"a": 22_400, "b": 16_000}


def test_a_source_that_has_been_seen_often_enough_leaves_and_the_other_goes_on(tmp_path: Path) -> None:
    one = mixture(tmp_path, a={"epochs": Fraction(2)})
    (a,) = (part for lane in one.stages[0][1].lanes for part in lane.parts if part.source.name == "a")
    assert by_source(one.drawn(10_000))["a"] == 2 * a.pool.count * 64
    both = mixture(tmp_path, a={"epochs": Fraction(1)}, b={"epochs": Fraction(1)})
    total = both.stages[0][1].buckets.total
    assert total is not None
    both.batch(0, total - 1)
    with pytest.raises(ValueError, match=rf"^train\.tokens: the sources are used up after {total} steps"):
        both.batch(0, total)


def test_long_documents_come_more_often(tmp_path: Path) -> None:
    plain, upsampled = mixture(tmp_path), mixture(tmp_path, b={"long": ((300, Fraction(3)),)})
    share = sum(n for n in LONG if n >= 300) / sum(LONG)
    drawn = upsampled.drawn(8000)
    total = sum(n for name, n in drawn.items() if name.startswith("b/"))
    assert by_source(plain.drawn(8000))["b"] == total
    assert abs(drawn["b/from 300/64"] / total - 3 * share / (2 * share + 1)) < 0.01
    store = upsampled.sources[1].store
    ends = store.offsets
    for step in range(10):
        for slot in upsampled.slots(step):
            if slot.part.name == "b/from 300/64":
                places = np.searchsorted(ends, slot.pieces(0)[:, 0], side="right")
                assert ((ends[places] - ends[places - 1]) >= 300).all()


def test_replay_is_a_fresh_order_and_each_source_has_its_own(tmp_path: Path) -> None:
    def first(one: Batches, source: str) -> list[list[int]]:
        slots = [slot for step in range(12) for slot in one.slots(step) if slot.part.source.name == source]
        return [slot.pieces(0).tolist() for slot in slots]

    alone = of([Source("", mixture(tmp_path).sources[0].store)], 128, CHOSEN, None)
    again, replayed = mixture(tmp_path), mixture(tmp_path, a={"order": 1})
    orders = [first(alone, ""), first(again, "a"), first(replayed, "a")]
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert sum(x in a for x in b) < len(b) / 4
    assert first(again, "b") == first(replayed, "b")


def test_mixtures_of_folders(tmp_path: Path) -> None:
    portions = {}
    for name, count in (("new", 80), ("old", 60)):
        texts = str(write(tmp_path / name, prose(count, 300, seed=count)))
        portions[name] = Portion(data=Data(corpus="text", path=texts, store=f"{texts}-store"), weight=count)
    one = Mixture(sources=portions, max_length=64, heldout=0.2, heldout_tokens=512).open(256)
    assert one.tokenizer.size == 257 and len(one.heldout()) == 8
    assert set(one.drawn(50)) == {"new/64", "old/64"}
    card = one.card()
    assert set(card["sources"]) == {"new", "old"} and card["sources"]["old"]["documents"] == 60
    known = {one.fingerprint}
    for changes in ({"weight": 3}, {"weight": 40, "epochs": 2}, {"weight": 40, "order": 1}):
        portions["new"] = Portion(data=portions["new"].data, **changes)
        known.add(Mixture(sources=portions, max_length=64, heldout=0.2, heldout_tokens=512).open(256).fingerprint)
    assert len(known) == 4


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"weight": -1}, "data.sources.a.weight=-1: must not be negative"),
        ({"weight": 0}, "data.sources: some weight must be above 0 from token 0 on"),
        ({"weight": [[0, 1], [1e6, 0]]}, "data.sources: some weight must be above 0 from token 1000000 on"),
        ({"weight": [[5, 1]]}, "data.sources.a.weight=[[5, 1]]: must begin with token 0"),
        ({"weight": [[0, 1], [5]]}, "data.sources.a.weight=[[0, 1], [5]]: must be lines of [tokens, number]"),
        ({"weight": [[0, 1], [9, 1], [5, 1]]}, "data.sources.a.weight=[[0, 1], [9, 1], [5, 1]]: must have its tokens"),
        ({"weight": "x"}, "data.sources.a.weight=x: must be lines of"),
        ({"epochs": 0}, "data.sources.a.epochs=0: must be above 0, or null"),
        ({"long": [[0, 2]]}, "data.sources.a.long=[[0, 2]]: must begin with 1 token or more"),
    ],
)
def test_bad_portions_are_refused_in_one_line(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError) as error:
        Mixture(sources={"a": Portion(data=Data(corpus="stdlib"), **changes)})
    assert str(error.value).startswith(line)


def folders(tmp_path: Path, **about: dict[str, Any]) -> dict[str, Portion]:
    """Sources by name: each a folder of texts of its own, or that of `of`."""
    found = {}
    for seed, (name, more) in enumerate(about.items()):
        texts = str(write(tmp_path / more.pop("of", name), prose(60, 300, seed=seed)))
        found[name] = Portion(data=Data(corpus="text", path=texts, store=f"{tmp_path / name}-store"), **more)
    return found


SMALL: dict[str, Any] = {"max_length": 64, "heldout": 0.2, "heldout_tokens": 512}


def shares(one: Batches, steps: int, after: int = 0) -> dict[str, float]:
    """Of the tokens of some steps, what each source gave."""
    before, drawn = one.drawn(after), one.drawn(after + steps)
    found = {name.split("/")[0]: drawn[name] - before.get(name, 0) for name in drawn}
    return {name: tokens / (256 * steps) for name, tokens in found.items()}


def test_replay_is_the_share_of_the_old_ones_whatever_the_weights(tmp_path: Path) -> None:
    portions = folders(
        tmp_path,
        new={"weight": 3},
        other={"weight": [[0, 1], [256_000, 9]]},
        old={"weight": 5, "old": True},
        older={"weight": [[0, 0], [128_000, 15]], "old": True},
    )
    one = Mixture(sources=portions, replay=0.2, **SMALL).open(256)
    assert one.sides == {"new": False, "other": False, "old": True, "older": True}
    assert shares(one, 500) == pytest.approx({"new": 0.6, "other": 0.2, "old": 0.2, "older": 0}, abs=4e-3)
    assert shares(one, 500, 500) == pytest.approx({"new": 0.6, "other": 0.2, "old": 0.05, "older": 0.15}, abs=4e-3)
    assert shares(one, 500, 1000) == pytest.approx({"new": 0.2, "other": 0.6, "old": 0.05, "older": 0.15}, abs=4e-3)
    alone = Mixture(sources=portions, replay=0.0, **SMALL).open(256)
    assert shares(alone, 40) == pytest.approx({"new": 0.75, "other": 0.25}, abs=0.01)
    assert set(alone.heldout_by_source()) == set(portions), "what is not replayed may be forgotten"
    assert [len(windows) for windows in alone.heldout_by_source().values()] == [2, 2, 2, 2]
    assert alone.fingerprint != one.fingerprint
    for changed in portions.values():
        changed.old = False
    assert Mixture(sources=portions, **SMALL).open(256).sides == {}


@pytest.mark.parametrize(
    ("replay", "weights", "line"),
    [
        (1.5, (1, 1), "data.replay=1.5: must be a share from 0 to 1, or null"),
        (True, (1, 1), "data.replay=True: must be a share from 0 to 1, or null"),
        (0.1, (1, [[0, 1], [9, 0]]), "data.replay=0.1: some source with old: true must have a weight from token 9 on"),
        (0.1, (0, 1), "data.replay=0.1: some source with old: false must have a weight from token 0 on"),
    ],
)
def test_bad_replays_are_refused_in_one_line(replay: Any, weights: tuple[Any, Any], line: str) -> None:
    new, old = (Portion(data=Data(corpus="stdlib"), weight=w, old=i == 1) for i, w in enumerate(weights))
    with pytest.raises(ValueError) as error:
        Mixture(sources={"new": new, "old": old}, replay=replay)
    assert str(error.value) == line


def test_a_corpus_that_is_an_old_one_is_refused(tmp_path: Path) -> None:
    same = folders(tmp_path, new={}, old={"old": True, "of": "new"})
    with pytest.raises(
        ValueError, match=r"^data\.sources\.new\.data: must be another corpus than data\.sources\.old, "
    ):
        Mixture(sources=same, replay=0.1, **SMALL).open(256)
    write(tmp_path / "new", prose(80, 300, seed=7))  # documents that the old one has not
    assert Mixture(sources={**folders(tmp_path / "x", old={"old": True}), "new": same["new"]}, **SMALL).open(256)


def test_more_held_out_than_generated_hay_leaves_is_refused() -> None:
    sources = {"needles": Portion(data=Data(corpus="needles"))}
    with pytest.raises(ValueError, match=r"^data\.heldout=0\.3: must be at most 0\.25 for corpus needles"):
        Mixture(sources=sources, heldout=0.3).check()


def test_a_missing_corpus_is_named(tmp_path: Path) -> None:
    data = Data(corpus="text", path=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"^data\.sources\.a\.data\.path=.*: no such file or folder"):
        Mixture(sources={"a": Portion(data=data)}).check()
