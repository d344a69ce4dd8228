"""Rates over widths: factors against a table by hand, activations of wide and narrow models, ranks, bad input."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from models.axes import declarations, initialise
from models.block import Block
from models.ffn import SwiGLU
from models.linear import Linear
from models.lm import LM
from models.mixers import MIXERS
from models.moe import MoE
from models.sequence import Whole
from tests.foreign import RIGHT, prepared, verdict
from train.optim import transfer
from train.optim import width as rules
from train.optim.build import build_optimizer, set_rate
from train.optim.width import base_of
from train.run_config import ObjectConfig

BASE, HEAD, VOCABULARY = 32, 8, 16


def node(kind: str = "AdamW", **keys) -> ObjectConfig:
    return ObjectConfig({"_target_": f"train.optim.{kind}", "_partial_": True, "lr": 0.01, **keys})


def width(kind: str = "AdamW", **keys) -> ObjectConfig:
    return node(kind, transfer="width", base_width=BASE, **keys)


def model(dim: int, mixers: dict[str, str], *, experts: bool = False, tied: bool = False) -> LM:
    """A layer of each mixer: heads of 8 channels each, as many as the width has room for."""
    ffn = partial(MoE, num_experts=4, top_k=2, hidden=dim) if experts else partial(SwiGLU, hidden=2 * dim)
    options = {"mamba": {}, "mamba2": {"heads": 2 * dim // HEAD, "state": 8}}
    blocks = {
        n: partial(Block, mixer=partial(MIXERS[m], **options.get(m, {"heads": dim // HEAD})), ffn=ffn)
        for n, m in mixers.items()
    }
    return LM(vocabulary=VOCABULARY, dim=dim, layers=len(mixers), pattern=list(mixers), blocks=blocks, tied=tied)


HYBRID = {"g": "gla", "m": "mamba", "s": "mamba2", "a": "attention", "k": "kda"}
LAYERS = {name: f"layers.{i}.mixer" for i, name in enumerate(HYBRID)}
# At four times the base: (AdamW's rate, Muon's) of every weight that is not 1, by hand. Muon's update is √max(rows,
# columns) large, √(outputs / inputs) is wanted: both sides wider, √4 too large; inputs alone, √4 · √4 where they are
# the larger side. decay_in of GLA has 16 outputs; at the base its 32 inputs are the larger side as well. Matrices of
# 8 inputs and 64 outputs, or of 16 and 128, are as Muon wants them at both widths.
QUARTER, BOTH, INPUTS = 0.25, 0.5, 0.25
TABLE = {
    **{f"layers.{i}.ffn.experts.{n}": (QUARTER, BOTH) for i in range(5) for n in ("gate_up", "down")},
    **{f"layers.{i}.ffn.router.weight": (QUARTER, INPUTS) for i in range(5)},
    **{f"{LAYERS['g']}.{n}.weight": (QUARTER, BOTH) for n in ("qkv", "gate", "out")},
    f"{LAYERS['g']}.decay_in.weight": (QUARTER, INPUTS),
    **{f"{LAYERS['m']}.{n}.weight": (QUARTER, BOTH) for n in ("x", "z", "dt", "out")},
    f"{LAYERS['m']}.dbc.weight": (QUARTER, INPUTS),
    **{f"{LAYERS['s']}.{n}.weight": (QUARTER, BOTH) for n in ("x", "z", "dt", "out")},
    f"{LAYERS['s']}.bc.weight": (QUARTER, INPUTS),
    **{f"{LAYERS['a']}.{n}.weight": (QUARTER, BOTH) for n in ("q", "kv", "out")},
    **{f"{LAYERS['k']}.{n}.weight": (QUARTER, BOTH) for n in ("qkv", "beta", "out")},
    **{f"{LAYERS['k']}.{n}.weight": (QUARTER, INPUTS) for n in ("decay_in", "gate_in")},
    "head.weight": (QUARTER, QUARTER),  # AdamW's with Muon too
}
STARTS = {"head.weight", *(f"layers.{i}.ffn.router.weight" for i in range(5))}


@pytest.mark.parametrize(("kind", "column"), [("AdamW", 0), ("CompactAdamW", 0), ("Muon", 1)])
def test_every_weight_has_the_factor_of_a_table_by_hand(kind, column):
    with torch.device("meta"):
        built = model(4 * BASE, HYBRID, experts=True)
    optimizer = build_optimizer(width(kind).build(), built, declarations(built))
    set_rate(optimizer, 0.01)
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    for name, p in built.named_parameters():
        factor = TABLE.get(name, (1.0, 1.0))[column]
        assert groups[p]["lr"] == pytest.approx(0.01 * factor), name
        decays = p.declared.decay
        assert groups[p]["lr"] * groups[p]["weight_decay"] == pytest.approx(0.001 if decays else 0), name


def test_head_and_routers_start_smaller_and_nothing_else_does():
    plain, smaller = (model(4 * BASE, HYBRID, experts=True) for _ in range(2))
    transfer.start_for_width(width(), smaller)
    before, after = (dict(initialise(each, seed=3).named_parameters()) for each in (plain, smaller))
    for name, p in before.items():
        assert torch.equal(after[name], p * 0.5 if name in STARTS else p), name


def test_at_the_base_width_nothing_changes():
    plain, based = (model(BASE, HYBRID, experts=True) for _ in range(2))
    transfer.start_for_width(width(), based)
    assert all(map(torch.equal, initialise(plain, 0).parameters(), initialise(based, 0).parameters()))
    factors = [
        [(g["factor"], g.get("weight_decay")) for g in build_optimizer(n.build(), m, declarations(m)).param_groups]
        for n, m in ((node("Muon"), plain), (width("Muon"), based))
    ]
    assert factors[0] == factors[1]


def changes(config: ObjectConfig, dim: int, mixer: str, experts: bool, steps: int = 3) -> dict[str, float]:
    """The root mean square of what some steps change in the outputs of every linear layer, block and of the head."""
    built = model(dim, {"a": mixer, "b": mixer}, experts=experts)
    transfer.start_for_width(config, built)
    initialise(built, seed=0)
    optimizer = build_optimizer(config.build(), built, declarations(built))
    set_rate(optimizer, config["lr"])
    tokens = torch.randint(VOCABULARY, (1, 64), generator=torch.Generator().manual_seed(1))
    seen: dict[str, torch.Tensor] = {}

    def see(name, module, given, output):
        seen[name] = (output[0] if isinstance(output, tuple) else output).detach()

    for name, module in built.named_modules():
        if isinstance(module, Linear | Block):
            module.register_forward_hook(partial(see, name))
    seq = Whole.of(torch.arange(64)[None])
    first: dict[str, torch.Tensor] = {}
    for _ in range(steps + 1):
        logits = built(tokens, seq).logits
        first = first or dict(seen)
        F.cross_entropy(logits[0, :-1], tokens[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: float((seen[name] - first[name]).square().mean().sqrt()) for name in first}


CASES = [
    *(("AdamW", mixer, False, 8) for mixer in ("gla", "gated_deltanet", "mamba2", "attention")),
    ("AdamW", "attention", True, 8),
    ("Muon", "gated_deltanet", False, 4),
    ("Muon", "attention", True, 4),
]


@pytest.mark.parametrize(("kind", "mixer", "experts", "times"), CASES)
def test_steps_change_activations_alike_at_each_width(kind, mixer, experts, times):
    """The coordinate check of 2203.03466 (appendix D.1): no table is asked. Without transfer the changes grow."""
    narrow = changes(node(kind), BASE, mixer, experts)
    wide, plain = (changes(c, times * BASE, mixer, experts) for c in (width(kind), node(kind)))
    grown = {name: wide[name] / narrow[name] for name in narrow}
    assert 0.4 < min(grown.values()) and max(grown.values()) < 1.5, grown
    assert max(plain[name] / narrow[name] for name in narrow) > times / 2


@pytest.mark.parametrize("forgotten", ["embed", "heads", "ffn"])
def test_an_axis_that_is_forgotten_shows_in_activations_and_in_the_table(monkeypatch, forgotten):
    narrow = changes(node(), BASE, "attention", False)
    monkeypatch.setattr(rules, "WIDE", tuple(axis for axis in rules.WIDE if axis != forgotten))
    wide = changes(width(), 8 * BASE, "attention", False)
    assert max(wide[name] / narrow[name] for name in narrow) > 1.5
    with pytest.raises(AssertionError):
        test_every_weight_has_the_factor_of_a_table_by_hand("AdamW", 0)


@pytest.mark.dist
@pytest.mark.parametrize("name", [pytest.param("adamw", marks=pytest.mark.slow), "muon"])
def test_ranks_that_share_data_and_widths_step_as_one_process(name):
    """Losses, gradients and weights of two steps of a run, in fp64; the one process has factors written down again."""
    overrides = RIGHT[f"{name}, transfer over widths, data 2 x tensor 2"]
    assert prepared(overrides, 2)[0].config.optimizer["base_width"] == 8  # of 32, as 64 are of 256
    found = verdict(None, overrides, 2)
    assert not isinstance(found, str), found
    assert found.first is None, found.first


def test_a_tied_head_asks_for_its_factor():
    tied = model(4 * BASE, {"a": "attention"}, tied=True)
    line = r"model\.tied_scale=0\.0883883: must be 0\.0441942 \(base_width\^½ / dim\) with a tied head and .*width"
    with pytest.raises(ValueError, match=line):
        transfer.check_transfer(width(), tied)
    tied.tied_scale = 0.0441942
    transfer.check_transfer(width(), tied)
    transfer.check_transfer(node(), model(4 * BASE, {"a": "attention"}, tied=True))


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (("depth", None), "optimizer.transfer=depth: must be one of none, width"),
        (("width", None), "optimizer.base_width=null: must be the dim that lr suits with optimizer.transfer=width"),
        (("width", 0), "optimizer.base_width=0: must be the dim that lr suits with optimizer.transfer=width"),
        (("none", 64), "optimizer.base_width=64: must be null with optimizer.transfer=none"),
    ],
)
def test_values_that_do_not_go_together_are_refused(keys, line):
    with pytest.raises(ValueError) as caught:
        base_of(*keys)
    assert str(caught.value) == line
