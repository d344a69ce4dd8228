"""What a world has counted against what the formulas predict: every transport and layout, every rank, every byte.

The model asks for everything: states of each kind of A, halos, all keys, a window of them, sums over documents.
"""

from functools import cache, partial

import numpy as np
import pytest
import torch

from models.axes import initialise
from models.block import Block
from models.ffn import SwiGLU
from models.lm import LM
from models.mixers import MIXERS
from models.moe import MoE
from parallel import activation_memory
from parallel.collectives import LEDGER
from parallel.mesh import Groups, everyone
from parallel.parallelize import parallelise
from parallel.schedule.comm_volume import How, Traffic, of_plan, of_weights
from parallel.schedule.plan import Group, MicroStep, Plan
from parallel.schedule.static import Static
from parallel.schedule.transport_cost import LinkCost, choose, seconds
from parallel.sequence import TRANSPORTS
from parallel.sequence.states.auto import measure
from tests.parity import DTYPE, Sample
from train.execute import Executor
from train.metrics.comm_trace import asked, weight_units

DIM, HEADS, BLOCKS = 24, 2, 3
LATENT, ROPE = 10, 2  # of a head of latents: values, and with positions keys
LINEAR = ("gla", "gated_deltanet", "retnet", "linear", "lru", "rglru", "mlstm", "longhorn")
HEADED = {"gla", "gated_deltanet", "retnet", "linear", "rglru", "mlstm"}


def model(heads: int, kv_heads: int, only: tuple[str, ...] = ()) -> LM:
    """A layer of each kind of A, two of softmax attention, one of them in a window; experts behind that."""
    mixers = {name: partial(MIXERS[name], **({"heads": HEADS} if name in HEADED else {})) for name in LINEAR}
    attention = partial(MIXERS["attention"], heads=heads, kv_heads=kv_heads, head_dim=4)
    mixers |= {"attention": attention, "window": partial(attention, window=7, sinks=3)}
    mixers["dsa"] = partial(MIXERS["dsa"], heads=heads, kv_heads=kv_heads, head_dim=4, top_k=5, index_dim=6)
    mixers["mla"] = partial(MIXERS["mla"], heads=heads, head_dim=4, rank=LATENT, rope_dim=ROPE)
    dense, moe = partial(SwiGLU, hidden=8), partial(MoE, num_experts=3, top_k=2, hidden=8)
    chosen = only or (*LINEAR[:-1], "attention", "window")
    blocks = {n: partial(Block, mixer=mixers[n], ffn=moe if n == "window" else dense) for n in chosen}
    return LM(vocabulary=32, dim=DIM, layers=len(chosen), pattern=list(chosen), blocks=blocks)


BATCH = [Sample((20, 1, 27)), Sample((11, 13), seed=1)]
LENGTHS = [len(s.tokens) for s in BATCH]
STARTS = [np.flatnonzero(s.positions == 0).tolist() for s in BATCH]


def unequal(ranks: int) -> Plan:
    """Short and long spans, two on a rank; a rank without a span; a group of fewer ranks beside an idle one."""
    if ranks == 2:
        both = Group((0, 1), (1, 0), (((0, 5),), ((5, 72),)))
        return Plan(0, tuple(LENGTHS), (MicroStep((both,)),))
    everyone = tuple(range(ranks))
    first = Group(everyone, (1,), (((0, 5),), ((5, 17),), ((17, 24),), ())[:ranks])
    few, alone = ((0, 2), 1) if ranks == 3 else ((1, 2, 3), 0)
    spans = (((0, 9), (20, 29)), ((9, 20),), ((29, 48),)) if ranks == 4 else (((0, 9), (39, 48)), ((9, 39),))
    second = MicroStep((Group(few, (0,), spans), Group((alone,), (), ((),))))
    return Plan(0, tuple(LENGTHS), (MicroStep((first,)), second))


def plans(ranks: int) -> dict[str, Plan]:
    static = {n: Static(layout=n).plan(0, LENGTHS, data=1, sequence=ranks) for n in ("contiguous", "zigzag")}
    found = {**static, "unequal": unequal(ranks)}
    for plan in found.values():
        plan.check(ranks)
    return found


PAIRS = [("gather", "gather"), ("relay", "ring"), ("allscan", "ulysses"), ("relay", "usp")]


def transports(how: How):
    options = {"blocks": how.blocks} if how.recurrence == "allscan" else {}
    heads = {"heads": how.heads} if how.attention == "gather" else {}
    attention = TRANSPORTS["attention"][how.attention](keys=how.keys, **heads)
    return TRANSPORTS["recurrence"][how.recurrence](**options), attention


def counted(build, plan, how, precision="fp32", remat="none", batch=BATCH, sharded=False, reshard=True):
    """(bytes, calls) by "axis/purpose" of this rank in one step of training."""
    with torch.device("meta" if sharded else "cpu"):
        lm = build()
    lm.compute = DTYPE[precision]
    device = torch.device("cpu")
    if sharded:
        parallelise(lm, everyone(device), seed=1, dtype=DTYPE[precision], remat=remat, reshard_after_forward=reshard)
    else:
        initialise(lm.to(DTYPE[precision]), seed=1)
        activation_memory.recompute(lm.layers, remat)
    groups = Groups()
    executor = Executor(lm, groups, device, *transports(how), 0.05)
    LEDGER.take()
    executor.train(plan, batch)
    return tuple({"/".join(entry): n for entry, n in part.items()} for part in LEDGER.take())


KEY_HEADS = dict.fromkeys(("gather", "ulysses", "usp"), ("unequal", "contiguous"))  # layouts, for attention alone
# Of attention alone, key heads: one each, and heads too few for four ranks. The whole model has a key head for all.
MODELS = {"whole": (12, 1), "a head each": (12, 12, ("attention",)), "few heads": (2, 2, ("attention",))}
MODELS["latents"] = (12, 1, ("mla",))
MODELS["selected"] = (2, 1, ("dsa",))
MODELS["softmax"] = (12, 1, ("attention", "window"))  # for the last pair: another has its transport of states


def every_cell(ranks):
    """In one world: all layouts and pairs of transports."""
    return {
        (name, layout, pair): counted(partial(model, *options), plan, How(*pair, BLOCKS, 2))
        for name, options in MODELS.items()
        for layout, plan in plans(ranks).items()
        for pair in PAIRS
        if fits(options[0], plan, pair[1]) and layout in layouts(name, pair)
    }


def layouts(name: str, pair: tuple[str, str]) -> tuple[str, ...]:
    """The layouts in which a model is counted with a pair of transports."""
    if name in ("whole", "softmax"):
        return ("contiguous", "zigzag", "unequal") if (name == "softmax") == (pair == PAIRS[-1]) else ()
    return KEY_HEADS.get(pair[1], ("unequal",))


def fits(heads: int, plan: Plan, attention: str) -> bool:
    sizes = {len(group.ranks) for micro in plan.micro_steps for group in micro.groups}
    return attention != "ulysses" or all(heads % size == 0 for size in sizes)


@cache
def asks(*options, precision="fp32"):
    with torch.device("meta"):
        lm = model(*options)
    lm.compute = DTYPE[precision]
    return asked(lm)


def predicted(options, plan, how, precision="fp32", remat="none"):
    found = of_plan(plan, STARTS, asks(*options, precision=precision), how, recompute=remat)
    return [by_axis(found[rank]) for rank in sorted(found)]


def by_axis(traffic: Traffic, axis: str = "sequence"):
    return tuple({f"{axis}/{p}": n for p, n in part.items()} for part in (traffic.bytes, traffic.calls))


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3)), 4])
def test_measured_is_predicted_byte_for_byte_on_every_rank(run, ranks):
    measured = run(ranks, every_cell, ranks)
    for cell in measured[0]:
        name, layout, pair = cell
        want = predicted(MODELS[name], plans(ranks)[layout], How(*pair, BLOCKS, 2))
        assert [got[cell] for got in measured] == want, cell
    once = (ranks - 1) * -(-len(BATCH[0].tokens) // ranks) * (LATENT + ROPE) * 4  # the latents, and no values
    once += (ranks - 1) * -(-len(BATCH[1].tokens) // ranks) * (LATENT + ROPE) * 4
    gathered = measured[0]["latents", "contiguous", PAIRS[0]][0]
    assert gathered["sequence/keys and values"] == 2 * once and gathered["sequence/keys and values gradient"] == once
    purposes = {purpose for got in measured for cell in got.values() for purpose in cell[0]}
    assert purposes >= {f"sequence/{p}" for p in ("halo", "state", "queries", "keys and values", "document sums")}


FEW = ("gla", "attention", "window")


def recomputed():
    plan, how = plans(2)["zigzag"], How("relay", "ring")
    return {
        (precision, remat): counted(partial(model, 12, 12, FEW), plan, how, precision, remat)
        for precision, remat in [("fp32", "selective"), *(("fp64", policy) for policy in activation_memory.RECOMPUTE)]
    }


@pytest.mark.dist
def test_what_is_computed_again_is_asked_again(run):
    measured = run(2, recomputed)
    for precision, remat in measured[0]:
        want = predicted((12, 12, FEW), plans(2)["zigzag"], How("relay", "ring"), precision, remat)
        assert [got[precision, remat] for got in measured] == want, (precision, remat)
    sent = {remat: sum(measured[0]["fp64", remat][1].values()) for remat in activation_memory.RECOMPUTE}
    assert sent["none"] == sent["selective"] < sent["full"]


def states(recurrence, long):
    """What crosses between ranks of each layer's states, at a length and at four times as much."""
    documents = (4 * 48,) if long else (48,)
    plan = Static(layout="contiguous").plan(0, [sum(documents)], data=1, sequence=3)
    how = How(recurrence, "gather", 4)
    found = {}
    for name in LINEAR:
        bytes, calls = counted(partial(model, 2, 2, (name,)), plan, how, batch=[Sample(documents)])
        found[name] = {p: (n, calls[p]) for p, n in bytes.items() if "state" in p}
    return found


def several_states():
    return {(name, long): states(name, long) for name in ("gather", "relay", "allscan") for long in (False, True)}


@pytest.mark.slow
@pytest.mark.dist
def test_the_bytes_of_states_do_not_depend_on_the_length_and_all_scan_sends_no_more_than_the_state(run):
    measured = run(3, several_states)
    for got in measured:
        for name in ("gather", "relay", "allscan"):
            assert got[name, True] == got[name, False]
    all_scan_sends_no_more_than_the_state([got["allscan", False] for got in measured])


def foretold(recurrence, long):
    """By rank, what `states` counts on it, by the formulas."""
    tokens, found = 48 * (4 if long else 1), [{} for _ in range(3)]
    plan = Static(layout="contiguous").plan(0, [tokens], data=1, sequence=3)
    for name in LINEAR:
        traffic = of_plan(plan, [[0]], asks(2, 2, (name,)), How(recurrence, "gather", 4))
        for rank, own in enumerate(found):
            bytes, calls = by_axis(traffic[rank])
            own[name] = {p: (n, calls[p]) for p, n in bytes.items() if "state" in p}
    return found


def test_the_bytes_of_states_are_foretold_for_any_length():
    """By the formulas: the test above holds them to what ranks count."""
    for name in ("gather", "relay", "allscan"):
        assert foretold(name, True) == foretold(name, False) != [dict.fromkeys(LINEAR, {})] * 3
    all_scan_sends_no_more_than_the_state(foretold("allscan", False))


def all_scan_sends_no_more_than_the_state(ranks):
    K, V = DIM // 2 // HEADS, DIM // HEADS
    gdn = MIXERS["gated_deltanet"](dim=DIM, heads=HEADS)
    elements = {
        "gla": HEADS * K * V,
        "gated_deltanet": HEADS * gdn.key_dim * gdn.value_dim,
        "retnet": HEADS * (DIM // HEADS) * (2 * DIM // HEADS),
        "linear": HEADS * (DIM // HEADS) * (DIM // HEADS),
        "lru": 2 * DIM,
        "rglru": DIM,
        "mlstm": HEADS * (K * V + K + 2),  # the normaliser, its unit, and whether there is one
        "longhorn": 2 * DIM * 16,
    }
    for rank, got in enumerate(ranks):
        for name, number in elements.items():
            hop = {"state": rank > 0, "state gradient": rank < 2}
            want = {f"sequence/{p}": 4 * number for p, there in hop.items() if there}
            sent = got[name]
            assert {p: bytes for p, (bytes, _) in sent.items()} == want, (rank, name)
            assert all(1 < calls <= 4 for _, calls in sent.values())


def weights():
    twice = Static(tokens_per_rank=24).plan(0, LENGTHS, data=1, sequence=2)
    sent = {reshard: counted(partial(model, 2, 2), twice, How(), sharded=True, reshard=reshard) for reshard in RESHARDS}
    return sent, len(twice.micro_steps)


RESHARDS = (True, False)


@pytest.mark.dist
def test_what_sharding_sends_is_counted_and_predicted(run):
    """Weights that are let go are gathered twice a micro-step, others once a step."""
    for sent, micro_steps in run(2, weights):
        assert micro_steps == 2
        gathers = {}
        for reshard in RESHARDS:
            with torch.device("meta"):
                units = weight_units(model(2, 2), itemsize=4, reshard=reshard)
            want = by_axis(of_weights(units, 2, micro_steps), "world")
            found = tuple({p: n for p, n in part.items() if "world/" in p} for part in sent[reshard])
            assert found == want, reshard
            gathers[reshard] = found[1]["world/weights"]
        assert gathers[False] == len(units) and gathers[True] == 2 * micro_steps * (len(units) - 1) + 1


def test_the_fastest_is_chosen_from_latency_bandwidth_ranks_and_kind():
    far, near = LinkCost(1e-3, 1e9), LinkCost(1e-6, 1e9)
    found = seconds(4, 100, 1000, LinkCost(0.5, 1000.0), 4)
    assert found == pytest.approx({"gather": 1 + 6.3, "relay": 9.0, "allscan": 9.0})
    found = seconds(4, 100, 1000, LinkCost(0.5, 1000.0), 4, spans=2)
    assert found == pytest.approx({"gather": 1 + 12.6, "relay": 18.0, "allscan": 13.5})
    assert choose(8, 1 << 10, 1 << 16, far, 4) == "gather"  # latencies cost most, and it has two
    assert choose(64, 1 << 10, 1 << 20, near, 8) == "allscan"  # bytes do, and the hops of its blocks overlap
    assert choose(3, 1 << 20, 1 << 16, far, 4) == "relay"  # a dense A stays where it is; blocks would cost latencies
    assert choose(3, 1 << 8, 1 << 16, far, 4) == "gather"  # the same state, decayed by channel
    assert choose(2, 1 << 8, 1 << 16, far, 4) == "relay"  # one hop, and no decay travels


def measured_wire():
    groups = Groups()
    everyone = tuple(range(groups.world))
    groups.open([everyone])
    return measure(groups.comm(everyone), groups.world_comm, torch.device("cpu"))


@pytest.mark.dist
def test_all_ranks_measure_the_same_wire(run):
    wires = run(3, measured_wire)
    assert len(set(wires)) == 1
    assert 1e-7 < wires[0].latency < 1 and 1e5 < wires[0].bandwidth < 1e13
