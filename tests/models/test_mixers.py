"""What every mixer owes its callers. The tests go through the registry: a mixer added is tested on the day it is added.

A mixer that needs more than a model width to be built says what in NEEDED; options that change its path stand in MORE.
"""

import inspect
import itertools
from dataclasses import dataclass, fields
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.axes import AXES, declarations, initial, initialise
from models.cross_layer import Coupled
from models.kernels.indexed_attention import Selected
from models.mixers import MIXERS
from models.mixers.lower_bounds import bounds, log_forget
from models.nonlinear_recurrence import Serial
from models.sequence import Memory, Whole
from models.token_subset import Picked, Tail
from tests.models.rules import ORACLES, SERIAL

DIM = 16
NEEDED = {"heads": 2, "kv_heads": 1, "chunk": 16}
MORE = {
    "attention": [
        {"heads": 4, "kv_heads": 2, "window": 5, "sinks": 2, "qk_norm": True, "gate": True},
        {"heads": 4, "kv_heads": 2, "qk_norm": True, "norm_heads": "all", "qkv_bias": True, "out_bias": True}
        | {"scale": 0.3},
        {"heads": 4, "kv_heads": 2, "softcap": 0.4, "sink_logits": True},
    ],
    "deltanet": [{"negative_eigenvalues": True, "gate": True, "expand_v": 2.0}, {"conv": None}],
    "gated_deltanet": [
        {"value_heads": 4, "negative_eigenvalues": True, "expand_v": 2.0, "conv": 2, "conv_bias": True},
        {"conv": None},
    ],
    "gated_deltanet2": [{"value_heads": 4, "negative_eigenvalues": True, "expand_v": 2.0, "conv": 2}, {"conv": None}],
    "dsa": [
        {"heads": 4, "kv_heads": 2, "top_k": 7, "index_heads": 3, "index_dim": 6, "qk_norm": True, "gate": True},
        {"top_k": 5, "stage": "dense"},
    ],
    "gated_conv": [{"conv": 2, "bias": True}, {"conv": 1}],
    "gated_deltaproduct": [{"steps": 3, "negative_eigenvalues": False, "expand_k": 0.5}],
    "gla": [{"conv": None, "feature": "relu"}, {"conv_bias": True, "feature": "elu"}],
    "hgrn2": [{"expand_k": 0.5}],
    "kda": [{"negative_eigenvalues": True, "expand_k": 0.5}],
    "lact": [{"chunk": 20, "expand": 1.5}],
    "lightnet": [{"expand_k": 0.5}],
    "lightning": [{"rates": "transnormer"}],
    "linear": [{"normalise": True}, {"feature": "relu"}],
    "mamba": [
        {"state": 3, "rank": 2, "expand": 1.5},
        {"state": 3, "rank": 2, "inner_norm": "weighted"},
        {"state": 3, "rank": 2, "inner_norm": "plain"},
    ],
    "mamba2": [
        {"out_norm": "none", "dt_min": 0.05},
        {"out_norm": "before_gate"},
        {"groups": 2, "state": 4, "conv_bias": False},
    ],
    "mamba3": [
        {"groups": 2, "state": 5, "rotated": 1.0},
        {"state": 4, "out_norm": True, "expand": 1.0},
    ],
    "mingru": [{"expand": 1.5}],
    "mla": [
        {"rank": 6, "head_dim": 5, "rope_dim": 4, "value_dim": 3, "query_rank": 7, "bias": True, "scale": 0.3},
        {"rank": 6, "rope_dim": 2, "absorb": False},
    ],
    "mom": [
        {"memories": 3, "top_k": 1, "shared": False, "inner": partial(MIXERS["mlstm"], heads=2)},
        {"memories": 2, "top_k": 1, "inner": partial(MIXERS["rglru"], heads=2, conv=3)},
        {"memories": 3, "norm_after": True},
    ],
    "rglru": [{"bias": True, "conv": None}],
    "rwkv6": [{"mix_rank": 3, "decay_rank": 5}],
    "rwkv7": [{"decay_rank": 3, "rate_rank": 5, "value_rank": 2, "gate_rank": 7}],
    "retnet": [{"expand_k": 0.5, "expand_v": 1.0}],
    "slstm": [{"conv": 1}, {"conv": None}],
    "titans": [{"expand_k": 0.5, "expand_v": 2.0, "conv": 2}],
}
CASES = [(name, {}) for name in sorted(MIXERS)] + [(name, options) for name in MORE for options in MORE[name]]

# Long and short documents, of one token, on and beside the chunks' edge at 64.
DOCUMENTS = (40, 23, 1, 1, 2, 8)
T = sum(DOCUMENTS)
POSITIONS = torch.stack(
    [torch.cat([torch.arange(n) for n in DOCUMENTS]), torch.cat([torch.arange(n) for n in (63, 12)])]
)
# Sums of log decays over a chunk reach past a document's start: after a change before it they round differently.
ROUNDED = {
    "gated_deltanet",
    "gated_deltanet2",
    "gated_deltaproduct",
    "gla",
    "hgrn2",
    "kda",
    "mamba2",
    "mamba3",
    "mlstm",
    "mom",
    "titans",
}

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))


def build(case, dtype=torch.float64, device="cpu"):
    name, options = case
    asked = inspect.signature(MIXERS[name]).parameters
    given = {key: value for key, value in NEEDED.items() if key in asked} | options
    missing = [k for k, p in asked.items() if p.default is p.empty and k not in given and k != "dim"]
    assert not missing, f"tests/models/test_mixers.py: give NEEDED a value for {missing} of {name}"
    with torch.device(device):
        mixer = MIXERS[name](dim=DIM, **given)
    return mixer if device == "meta" else initialise(mixer, 0).to(dtype)


def shaken(mixer):
    """Every parameter moved from where it starts: an unused bias of zero, or weight of one, would not show."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return mixer


def rows(mixer):
    """What the model would give of the parameters that layers share: the middle one of three layers."""
    generator = torch.Generator().manual_seed(6)
    given = {}
    for c in getattr(mixer, "couplings", ()):
        table = torch.randn(3, c.width, generator=generator, dtype=torch.float64)
        given[c.name] = c.rows(table)[1].requires_grad_()
    return given


def inputs(dtype=torch.float64, positions=POSITIONS):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*positions.shape, DIM, generator=generator, dtype=torch.float64).to(dtype)


@dataclass(kw_only=True)
class TokenByToken(Whole):
    """The sequence as the papers see it: recurrences by their token loops, attention by one masked softmax."""

    def scan(self, recurrence, *xs, slot):
        if isinstance(recurrence, Serial):
            sizes = {each.name: getattr(recurrence, each.name) for each in fields(recurrence)}
            return SERIAL[recurrence.rule](*xs, *sizes.pop("shared"), positions=self.positions, **sizes)
        if isinstance(recurrence, Tail):  # what moves on is nothing where all tokens are here
            return super().scan(recurrence, *xs, slot=slot)
        if isinstance(recurrence, Picked):
            return self.by_document(recurrence, xs)
        return ORACLES[recurrence.rule](*xs, *recurrence.shared, starts=self.starts, scale=recurrence.scale)[0]

    def by_document(self, recurrence, xs):
        """Each document's tokens among those picked, in a loop of their own."""
        rows = []
        for b, n in enumerate(recurrence.choice.counts):
            document = self.documents[b, recurrence.choice.indices[b, :n]]
            own = [[x[b : b + 1, :n][:, document == d] for x in xs] for d in document.unique_consecutive()]
            starts = [torch.arange(each[0].shape[1])[None] == 0 for each in own]
            loop, scale = ORACLES[recurrence.rule], recurrence.scale
            outs = [
                loop(*each, *recurrence.shared, starts=s, scale=scale)[0] for each, s in zip(own, starts, strict=True)
            ]
            out = torch.cat(outs, 1)
            rows.append(F.pad(out, [0, 0] * (out.dim() - 2) + [0, xs[0].shape[1] - n]))
        return torch.cat(rows)

    def attend(self, q, k, v, *, slot, window=None, sinks=0, softcap=None, sink_logits=None, values_in_keys=False):
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        at, document = torch.arange(q.shape[1]), self.starts.cumsum(1)
        back = at[:, None] - at[None, :]
        near = (back < (window or len(at))) | (self.positions < sinks)[:, None, :]
        seen = (document[:, :, None] == document[:, None, :]) & (back >= 0) & near
        scores = torch.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        if sink_logits is not None:  # a key more, whose value is 0
            sinks_BHT1 = sink_logits[:, None, None].expand(*scores.shape[:3], 1)
            return torch.einsum("bhts,bshv->bthv", torch.cat((scores, sinks_BHT1), -1).softmax(-1)[..., :-1], v)
        return torch.einsum("bhts,bshv->bthv", scores.softmax(-1), v)

    def attend_selected(self, q, k, v, index, *, slot):
        document, outs, losses = self.starts.cumsum(1), [], []
        for b, t in itertools.product(range(q.shape[0]), range(q.shape[1])):
            at = [s for s in range(t + 1) if document[b, s] == document[b, t]]
            score = ((index.k[b, at] @ index.q[b, t].T).relu() * index.weights[b, t]).sum(1)
            order = sorted(range(len(at)), key=lambda i: (-score[i].item(), -at[i]))  # noqa: B023
            order = order if index.dense else order[: index.top_k]
            chosen = [at[i] for i in order]
            keys, values = (x[b, chosen].repeat_interleave(q.shape[2] // x.shape[2], 1) for x in (k, v))
            p = (torch.einsum("hk,shk->sh", q[b, t], keys) / q.shape[-1] ** 0.5).softmax(0)
            outs.append(torch.einsum("sh,shv->hv", p, values))
            target = p.detach().mean(1)
            losses.append((target * (target.log() - score[order].log_softmax(0))).sum())
        return Selected(torch.stack(outs).view(*q.shape[:3], -1), torch.stack(losses).view(q.shape[:2]))


def outputs_and_gradients(mixer, run, x):
    """run(x, rows) and the gradients of a weighted sum of it: by x, the rows, and every parameter."""
    x, given = x.detach().requires_grad_(), rows(mixer)
    out = run(x, given)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    named = {"x": x, **given, **dict(mixer.named_parameters())}
    gradients = torch.autograd.grad((out * weights.to(out.dtype)).sum(), list(named.values()))
    return {"output": out.detach(), **dict(zip(named, gradients, strict=True))}


def assert_close(got, want, tolerance=1e-10):
    """||a - b|| ≤ tol·||b||; a gradient that is zero in theory is held to the norm of all of them."""
    scale = torch.stack([b.norm() for name, b in want.items() if name != "output"]).norm()
    for name, b in want.items():
        size = b.norm() if name == "output" or b.norm() > 1e-6 * scale else scale
        error = (got[name] - b).norm()
        assert error <= tolerance * size, f"{name}: {error:.2e} over {tolerance:.0e} of {size:.2e}"


@each_case
def test_outputs_and_gradients_equal_the_same_mixer_over_a_token_loop(case):
    mixer = shaken(build(case))
    honest, loop = Whole.of(POSITIONS), TokenByToken.of(POSITIONS)
    got = outputs_and_gradients(mixer, lambda x, given: mixer(x, honest, slot="s", **given), inputs())
    want = outputs_and_gradients(mixer, lambda x, given: mixer(x, loop, slot="s", **given), inputs())
    assert_close(got, want)
    assert all(gradient.norm() > 0 for gradient in got.values()), "a parameter that nothing depends on"


@each_case
def test_any_split_into_spans_equals_the_whole(case):
    mixer, length = shaken(build(case)), 71
    positions = POSITIONS[:, :length]
    x = inputs(positions=positions)
    whole = outputs_and_gradients(mixer, lambda x, given: mixer(x, Whole.of(positions), slot="s", **given), x)

    def in_spans(cuts, x, given):
        memory, parts = Memory(), []
        for span, where in zip(x.split(cuts, 1), positions.split(cuts, 1), strict=True):
            parts.append(mixer(span, Whole.of(where, memory=memory), slot="s", **given))
            memory.advance()
        return torch.cat(parts, 1)

    for cuts in ([5, 1, 2, 47, 1, 15], [64, 7], [64, *[1] * 7]):  # unequal, a chunk, tokens
        assert_close(outputs_and_gradients(mixer, partial(in_spans, cuts), x), whole)


@each_case
def test_packed_documents_equal_documents_alone(case):
    mixer, x = shaken(build(case)), inputs()[:1]
    given = rows(mixer)
    packed = mixer(x, Whole.of(POSITIONS[:1]), slot="s", **given)
    for part, together in zip(x.split(DOCUMENTS, 1), packed.split(DOCUMENTS, 1), strict=True):
        alone = mixer(part, Whole.of(torch.arange(part.shape[1])[None]), slot="s", **given)
        torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("t", [0, 17, 45])
@each_case
def test_a_token_changes_nothing_before_it_and_no_other_document(case, t):
    mixer, x = shaken(build(case)), inputs()
    given, seq = rows(mixer), Whole.of(POSITIONS)
    changed = x.clone()
    changed[0, t] += torch.randn(DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    before, after = (mixer(each, seq, slot="s", **given) for each in (x, changed))
    own = (seq.documents == seq.documents[0, t]) & (torch.arange(T) >= t)
    other, rounded = (before - after)[~own], case[0] in ROUNDED
    assert other.abs().max() <= (1e-13 * before.abs().max() if rounded else 0.0)
    assert torch.equal(before[0, :t], after[0, :t])
    assert (before - after)[0, t].abs().max() > 1e-3


@each_case
def test_bf16_inputs_give_what_their_values_give_in_fp32(case):
    mixer, x = shaken(build(case, torch.float32)), inputs(torch.bfloat16)
    given = {name: row.float() for name, row in rows(mixer).items()}
    got, want = (mixer(each, Whole.of(POSITIONS), slot="s", **given) for each in (x, x.float()))
    assert got.dtype == torch.bfloat16
    selects = case[1].get("top_k", T) < T and case[0] == "dsa"  # of scores that are close another may be chosen
    assert (got.float() - want).norm() <= (1e-1 if selects else 2e-2) * want.norm()


@each_case
def test_a_mixer_built_on_the_meta_device_is_the_same_mixer(case):
    meta, plain = build(case, device="meta"), build(case, torch.float32)
    assert all(p.device.type == "meta" for p in meta.parameters())
    assert not list(meta.buffers()), "what is no parameter is lost when memory is given to a model"
    declared, filled = declarations(meta), meta.to_empty(device="cpu")
    with torch.no_grad():
        for key, p in filled.named_parameters():
            p.copy_(initial(0, key, declared[key], tuple(p.shape)))
            assert torch.equal(p, plain.get_parameter(key)), key
    x, seq = inputs(torch.float32), Whole.of(POSITIONS)
    assert torch.equal(filled(x, seq, slot="s"), plain(x, seq, slot="s"))


@each_case
def test_every_parameter_declares_its_axes_and_only_matrices_decay(case):
    mixer = build(case)
    for name, declared in declarations(mixer).items():
        parameter = mixer.get_parameter(name)
        assert len(declared.axes) == parameter.dim() and set(declared.axes) <= {None, *AXES}
        assert parameter.dim() > 1 or not declared.decay, f"{name}: gates, norms and biases do not decay"


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_what_does_not_fit_is_refused_by_name(name):
    asked = inspect.signature(MIXERS[name]).parameters
    assert all(p.kind is p.KEYWORD_ONLY for p in asked.values())
    with pytest.raises(ValueError, match="dim=0: must|must divide dim"):
        MIXERS[name](dim=0, **{key: value for key, value in NEEDED.items() if key in asked})
    if "heads" in asked:
        given = {key: value for key, value in NEEDED.items() if key in asked and key != "heads"}
        if asked["heads"].default is None:  # accepted, since another mixer had them, and without a meaning
            with torch.device("meta"):
                one, other = (MIXERS[name](dim=DIM, **given, heads=heads).state_dict() for heads in (None, 5))
            assert {k: x.shape for k, x in one.items()} == {k: x.shape for k, x in other.items()}
            return
        with pytest.raises(ValueError, match="heads=5: must divide"):
            MIXERS[name](dim=DIM, **given, heads=5)


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_the_eps_of_a_mixers_norms_is_an_option(name):
    """Every norm that it has, and none is out of its reach; the default is the one of old."""
    own = inspect.signature(MIXERS[name]).parameters
    given = {key: value for key, value in NEEDED.items() if key in own} | (
        {"qk_norm": True} if "qk_norm" in own else {"inner_norm": "weighted"} if "inner_norm" in own else {}
    )
    if name == "mom":  # its memories' own
        assert {m.eps for m in MIXERS[name](dim=DIM, **given).modules() if hasattr(m, "eps")} == {1e-5}
        return
    norms = [m for m in MIXERS[name](dim=DIM, **given).modules() if hasattr(m, "eps")]
    assert bool(norms) == ("norm_eps" in own)
    if norms:
        assert {m.eps for m in norms} == {own["norm_eps"].default}
        found = MIXERS[name](dim=DIM, **given, norm_eps=3e-4)
        assert {m.eps for m in found.modules() if hasattr(m, "eps")} == {3e-4}
        for wrong in (0.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"norm_eps={wrong}: must be above 0"):
                MIXERS[name](dim=DIM, **given, norm_eps=wrong)


def test_options_that_do_not_fit_are_refused_by_name():
    for name, wrong in {
        "linear": {"feature": "softmax"},
        "gla": {"feature": "softmax"},
        "dsa": {"stage": "warm"},
        "deltanet": {"conv_bias": True, "conv": None},
        "mom": {"norm_after": True, "inner": partial(MIXERS["gla"], heads=2)},
        "lightning": {"rates": "alibi"},
        "mamba2": {"groups": 3},
        "mamba3": {"rotated": 0.0},
        "gated_deltanet": {"value_heads": 3},
        "retnet": {"expand_k": 1 / 8},
    }.items():
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=|heads=2: must"):
            MIXERS[name](dim=DIM, heads=2, **wrong)


def test_a_value_head_reads_with_the_key_of_its_group():
    """value_heads=4 over heads=2 equals four heads of keys, the first of each pair with the other's weights."""
    grouped = shaken(build(("gated_deltanet", {"value_heads": 4, "expand_v": 2.0})))
    single = build(("gated_deltanet", {"heads": 4, "expand_k": 2.0, "expand_v": 2.0}))
    twice = [0, 0, 1, 1]
    with torch.no_grad():
        for name, p in single.named_parameters():
            source = grouped.get_parameter(name)
            if name in ("qkv.weight", "conv.weight"):
                q, k, v = source.split(grouped.widths)
                source = torch.cat([*(w.unflatten(0, (2, -1))[twice].flatten(0, 1) for w in (q, k)), v])
            p.copy_(source)
    x, seq = inputs(), Whole.of(POSITIONS)
    torch.testing.assert_close(grouped(x, seq, slot="s"), single(x, seq, slot="s"), rtol=1e-12, atol=1e-12)


def test_lower_bounds_start_even_rise_with_depth_and_hold():
    """2311.04823: γ sums a softmax over the layers below, f = γ + (1 - γ)·σ. Layer l of L has l / L."""
    first, *rest = bounds(torch.zeros(4, 3))
    assert first is None
    torch.testing.assert_close(torch.stack(rest), torch.tensor([[0.25], [0.5], [0.75]]).expand(3, 3))
    table = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    _, *learnt = bounds(table)
    assert all((a < b).all() for a, b in zip(learnt, learnt[1:], strict=False))
    f = torch.linspace(-20, 20, 41, dtype=torch.float64)[:, None]
    torch.testing.assert_close(log_forget(f, learnt[0]).exp(), learnt[0] + (1 - learnt[0]) * f.sigmoid())
    far = torch.tensor([[-300.0], [300.0]], requires_grad=True)
    out = torch.cat([log_forget(far, None), log_forget(far, bounds(table.float())[2])], dim=1)
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), [far, table]))


def test_layers_that_ask_for_the_same_parameter_share_it_and_one_alone_gets_none():
    layers = {"0": build(("hgrn2", {})), "1": build(("gla", {})), "2": build(("hgrn2", {}))}
    layers["3"] = build(("hgrn2", {"expand_k": 0.5}))
    coupled = initialise(Coupled(nn.ModuleDict(layers)), 0)
    assert {name: tuple(p.shape) for name, p in coupled.named_parameters()} == {"lower_bound_16": (2, DIM)}
    given = coupled()
    assert set(given) == {"0", "2"} and given["0"]["lower_bound"] is None
    torch.testing.assert_close(given["2"]["lower_bound"], torch.full((DIM,), 0.5))
    x, seq = inputs(), Whole.of(POSITIONS)
    bound = given["2"]["lower_bound"].double()
    assert not torch.equal(layers["2"](x, seq, slot="s", lower_bound=bound), layers["2"](x, seq, slot="s"))


def test_heads_of_retention_forget_at_the_papers_rates():
    """2307.08621: γ = 1 - 2^(-5 - arange(0, h)); head 24's is 1 in fp32, and its log is not 0."""
    mixer = MIXERS["retnet"](dim=52, heads=26)
    seen = []

    class Spy(Whole):
        def scan(self, recurrence, q, k, v, g, *, slot):
            seen.append(g)
            return v

    initialise(mixer, 0)(torch.randn(1, 3, 52), Spy.of(torch.arange(3)[None]), slot="s")
    want = (1 - 2.0 ** (-5 - torch.arange(26, dtype=torch.float64))).log()
    torch.testing.assert_close(seen[0][0, 1].double(), want, rtol=1e-6, atol=0)


def test_mamba2_norms_the_gated_output_in_groups():
    """2405.21060's code: RMSNorm(y · silu(z)), not RMSNorm(y) · silu(z), over the channels of a group."""
    mixer = shaken(build(("mamba2", {"groups": 2, "state": 4})))
    y, z = torch.randn(3, 32, dtype=torch.float64), torch.randn(3, 32, dtype=torch.float64)
    parts = (y * F.silu(z)).view(3, 2, 16)
    want = (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + 1e-5)).view(3, 32) * mixer.norm.weight
    torch.testing.assert_close(mixer.norm(y * F.silu(z)), want)


def test_memories_closed_together_are_added_up_before_the_one_norm():
    """As in the authors' layer: out(norm(Σ w_m read_m + read_shared, gate))."""
    mixer = shaken(build(("mom", {"memories": 2, "top_k": 2, "norm_after": True})))
    names = [name for name, _ in mixer.named_parameters() if name.endswith("norm.weight")]
    assert names == ["closing.norm.weight"]
    x, seq = inputs(), Whole.of(POSITIONS)
    weights, routing = mixer.router(x)
    weights = torch.zeros_like(routing.probabilities).scatter(-1, routing.choices, weights)
    o = mixer.shared.read(x, seq, slot="shared")
    for m, memory in enumerate(mixer.memories):
        o = o + weights[..., m, None, None] * memory.read(x, seq, slot=f"memory {m}")
    gate = F.linear(x, mixer.closing.gate.weight).view_as(o)
    normed = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * mixer.closing.norm.weight * F.silu(gate)
    torch.testing.assert_close(mixer(x, seq, slot="s"), F.linear(normed.flatten(-2), mixer.closing.out.weight))
