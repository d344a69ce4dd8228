"""Softmax attention in parts against one softmax with an explicit mask: windows, sinks, documents, spans in time."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from models.axes import initialise
from models.kernels.attention_tiles import ROWS, Fused, Plain
from models.kernels.packed_attention import _squares, attend_pieces, parts_of
from models.kernels.pieces import Piece, pieces_of
from models.mixers.attention import Attention
from models.positions import RoPE
from models.sequence import Memory, Whole

H, G, K, V = 4, 2, 8, 12
SEEN = [(None, 0), (1, 0), (1, 3), (7, 0), (7, 4), (4, 7), (130, 5), (250, 60), (1000, 3)]
ROWS_OF_DOCUMENTS = [(300, 1, 5, 200, 37), (37, 6, 500)]  # in total alike


def packed(rows=ROWS_OF_DOCUMENTS):
    return torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])


def draw(T, dtype=torch.float64, width=V):
    generator = torch.Generator().manual_seed(T)
    shapes = ((H, K), (G, K), (G, width))
    return [torch.randn(2, T, *s, dtype=dtype, generator=generator).requires_grad_() for s in shapes]


def oracle(q, k, v, positions, window, sinks):
    """softmax(q kᵀ / √K + mask) v, the whole mask written out."""
    documents, t = (positions == 0).cumsum(1), torch.arange(q.shape[1])
    seen = (documents[:, :, None] == documents[:, None, :]) & (t[:, None] >= t)
    if window is not None:
        seen &= (positions[:, :, None] - positions[:, None, :] < window) | (positions[:, None, :] < sinks)
    k, v = (x.repeat_interleave(H // G, dim=2) for x in (k, v))
    scores = torch.einsum("bthk,bshk->bhts", q, k) / K**0.5
    return torch.einsum("bhts,bshv->bthv", scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1), v)


def assert_same(got, want, xs, tolerance):
    """Outputs and gradients; one that is zero in theory is held to the size of the others."""
    weights = torch.randn_like(want)
    got, want = ((out, *torch.autograd.grad(out, xs, weights)) for out in (got, want))
    scale = max(b.norm() for b in want)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= tolerance * (b.norm() if b.norm() > 1e-6 * scale else scale)


@pytest.mark.parametrize("tile", [Fused, Plain])
@pytest.mark.parametrize("window, sinks", SEEN)
@pytest.mark.parametrize("width", [K, V])
def test_parts_equal_one_masked_softmax(tile, window, sinks, width):
    positions = packed()
    q, k, v = draw(positions.shape[1], width=width)
    got = attend_pieces(q, k, v, pieces_of(positions), [0, 0], window=window, sinks=sinks, tile=tile)
    assert_same(got, oracle(q, k, v, positions, window, sinks), (q, k, v), 1e-10)


@pytest.mark.parametrize("tile", [Fused, Plain])
@pytest.mark.parametrize("window, sinks", [(None, 0), (40, 4)])
def test_fp32_is_as_good_as_fp32_can_be(tile, window, sinks):
    positions = packed()
    xs = draw(positions.shape[1])
    narrow = [x.detach().float().requires_grad_() for x in xs]
    weights = torch.randn(2, positions.shape[1], H, V, dtype=torch.float64)
    want = oracle(*xs, positions, window, sinks)
    got = attend_pieces(*narrow, pieces_of(positions), [0, 0], window=window, sinks=sinks, tile=tile)
    gradients = [torch.autograd.grad(out, x, w) for out, x, w in ((got, narrow, weights.float()), (want, xs, weights))]
    pairs = zip((got, *gradients[0]), (want, *gradients[1]), strict=True)
    for a, b in pairs:
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_bf16_gradients_are_worked_out_in_fp32():
    positions = packed()
    xs = [x.detach().bfloat16().requires_grad_() for x in draw(positions.shape[1])]
    exact = [x.detach().double().requires_grad_() for x in xs]
    weights = torch.randn(2, positions.shape[1], H, V).bfloat16()
    got = attend_pieces(*xs, pieces_of(positions), [0, 0], window=40, sinks=4)
    want = oracle(*exact, positions, 40, 4)
    assert got.dtype == torch.bfloat16
    gradients = torch.autograd.grad(want, exact, weights.double())
    for a, b in zip(torch.autograd.grad(got, xs, weights), gradients, strict=True):
        assert a.dtype == torch.bfloat16 and (a - b).norm() <= 5e-3 * b.norm()  # bf16's own rounding: 2^-9


def test_whole_documents_by_a_devices_own_kernel():
    """What other devices than the CPU do with documents that need no merging."""
    positions = packed()
    q, k, v = draw(positions.shape[1])
    rows = [[part for run in runs for part in parts_of(run, run.begin, run.begin)] for runs in pieces_of(positions)]
    assert_same(_squares(q, k, v, rows), oracle(q, k, v, positions, None, 0), (q, k, v), 1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("window, sinks", [(None, 0), (40, 4)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_same_on_a_gpu(window, sinks, dtype, tolerance):
    positions = packed()
    xs = [x.detach().to(dtype).requires_grad_() for x in draw(positions.shape[1], width=K)]
    theirs = [x.detach().cuda().requires_grad_() for x in xs]
    weights = torch.randn(2, positions.shape[1], H, K).to(dtype)
    outs = [attend_pieces(*each, pieces_of(positions), [0, 0], window=window, sinks=sinks) for each in (xs, theirs)]
    wanted = (outs[0], *torch.autograd.grad(outs[0], xs, weights))
    got = (outs[1], *torch.autograd.grad(outs[1], theirs, weights.cuda()))
    for a, b in zip(got, wanted, strict=True):
        assert (a.cpu() - b).norm() <= tolerance * b.norm()


def test_strides_and_gradients_of_any_layout():
    """Last dimensions that do not lie together, and a sum's gradient, which is one number expanded."""
    xs = [torch.randn(1, K, 20, h, dtype=torch.float64).requires_grad_() for h in (H, G, G)]
    q, k, v = (x.permute(0, 2, 3, 1) for x in xs)
    positions = torch.arange(20)[None]
    got = attend_pieces(q, k, v, [[Piece(0, 20, 0)]], [0])
    want = oracle(q, k, v, positions, None, 0)
    for a, b in zip(torch.autograd.grad(got.sum(), xs), torch.autograd.grad(want.sum(), xs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window, sinks", SEEN)
@pytest.mark.parametrize("cuts", [(1, 2, 3, 150, 151, 290, 400), (37, 43, 300), tuple(range(0, 543, 60))])
def test_spans_in_time_equal_the_whole_and_keep_no_more_than_a_window(window, sinks, cuts):
    positions = packed()
    T = positions.shape[1]
    q, k, v = draw(T)
    memory, outs = Memory(), []
    for begin, end in zip((0, *cuts), (*cuts, T), strict=True):
        if begin == end:
            continue
        seq = Whole.of(positions[:, begin:end], memory=memory)
        span = (x[:, begin:end] for x in (q, k, v))
        outs.append(seq.attend(*span, slot="a", window=window, sinks=sinks))
        memory.advance()
        held = memory.entering["a"].k.shape[1]
        longest = int(positions[:, end - 1].max()) + 1
        assert held <= (longest if window is None else max(window - 1, sinks) + sinks)
    assert_same(torch.cat(outs, 1), oracle(q, k, v, positions, window, sinks), (q, k, v), 1e-10)


def test_decoding_token_by_token():
    positions = packed()[:, :60]
    q, k, v = (x[:, :60] for x in draw(positions.shape[1]))
    for window, sinks in ((None, 0), (5, 0), (5, 2), (2, 6)):
        memory, outs = Memory(), []
        for t in range(60):
            seq = Whole.of(positions[:, t : t + 1], memory=memory)
            outs.append(seq.attend(*(x[:, t : t + 1] for x in (q, k, v)), slot="a", window=window, sinks=sinks))
            memory.advance()
        torch.testing.assert_close(torch.cat(outs, 1), oracle(q, k, v, positions, window, sinks))


def peak_bytes(run):
    """The most memory that `run` holds at once, every allocation counted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    changes = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda e: e.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("tile", [Fused, Plain])
def test_a_window_over_a_long_document_takes_memory_for_its_tokens_only(tile):
    T, window = 32_768, 256
    q, k, v = (torch.randn(1, T, 2, 8).requires_grad_() for _ in range(3))

    def run():
        attend_pieces(q, k, v, [[Piece(0, T, 0)]], [0], window=window, sinks=4, tile=tile).sum().backward()

    run()
    tokens = T * 2 * 8 * 4  # bytes of q; a boolean mask of T² would be 1 GiB
    assert tokens < peak_bytes(run) <= 10 * tokens + 16 * ROWS * (window + ROWS) * 4


def test_a_continuing_span_takes_memory_for_its_keys_only():
    T, past = 1024, 16_384
    q, k, v = (torch.randn(1, n, 2, 8).requires_grad_() for n in (T, T + past, T + past))

    def run():
        attend_pieces(q, k, v, [[Piece(0, T, past)]], [past]).sum().backward()

    run()
    keys = (T + past) * 2 * 8 * 4
    assert keys < peak_bytes(run) <= 10 * keys < T * (T + past)  # the last: a boolean mask


def theirs(kind, **options):
    """A softmax layer of `transformers`, one block, its weights drawn at random, in eager mode."""
    import importlib

    import transformers

    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    name = {"qwen3": "Qwen3", "qwen3_next": "Qwen3Next"}[kind]
    config = getattr(transformers, f"{name}Config")(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=16, attention_dropout=0.0, **options
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    layer = getattr(module, f"{name}Attention")(config, layer_idx=0).eval()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return layer, getattr(module, f"{name}RotaryEmbedding")(config)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_next"])
def test_a_layer_equals_that_of_transformers(kind, window):
    """Qwen3: normalised queries and keys, own head width. Qwen3-Next: a gate, a quarter of the channels rotated."""
    nexts = kind == "qwen3_next"
    options = {"partial_rotary_factor": 0.25} if nexts else {}
    layer, rotary = theirs(kind, rope_parameters={"rope_type": "default", "rope_theta": 5e4, **options})
    positions = RoPE(base=5e4, fraction=0.25 if nexts else 1.0)
    ours = Attention(
        dim=32, heads=4, kv_heads=2, head_dim=16, qk_norm=True, gate=nexts, window=window, positions=positions
    )
    with torch.no_grad():
        q = layer.q_proj.weight
        if nexts:  # a head's query, then its gate
            q, gate = (x.flatten(0, 1) for x in q.unflatten(0, (4, 2, 16)).unbind(1))
            ours.gate.weight.copy_(gate)
        ours.q.weight.copy_(q)
        key_value = [x.weight.unflatten(0, (2, 16)) for x in (layer.k_proj, layer.v_proj)]
        ours.kv.weight.copy_(torch.stack(key_value, 1).flatten(0, 2))
        ours.out.weight.copy_(layer.o_proj.weight)
        for norm, other in ((ours.q_norm, layer.q_norm), (ours.k_norm, layer.k_norm)):
            norm.weight.copy_(other.weight + (1.0 if nexts else 0.0))
    x = torch.randn(1, 23, 32)
    t = torch.arange(23)
    seen = (t[:, None] >= t) & (t[:, None] - t < (window or 23))
    mask = torch.zeros(23, 23).masked_fill(~seen, -torch.inf)[None, None]
    want = layer(x, position_embeddings=rotary(x, t[None]), attention_mask=mask)[0]
    got = ours(x, Whole.of(t[None]), slot="a")
    assert (got - want).norm() <= 1e-5 * want.norm()


def test_window_and_sinks_of_the_layer_are_those_of_the_mask():
    layer = initialise(Attention(dim=32, heads=4, kv_heads=2, window=5, sinks=2), 0).double()
    x = torch.randn(1, 20, 32, dtype=torch.float64).requires_grad_()
    y = layer(x, Whole.of(torch.arange(20)[None]), slot="a")
    (gradient,) = torch.autograd.grad(y[0, 15].square().sum(), x)
    assert gradient[0].abs().sum(-1).nonzero().flatten().tolist() == [0, 1, *range(11, 16)]


def test_sizes_that_do_not_fit_are_refused_by_name():
    fits = {"dim": 32, "heads": 4, "kv_heads": 2}
    for wrong, said in [
        ({"window": 0}, "window=0: must be at least 1"),
        ({"sinks": 2}, "sinks=2: must be 0 without a window"),
        ({"window": 4, "sinks": -1}, "sinks=-1: must be"),
        ({"head_dim": 0}, "head_dim=0: must be at least 1"),
        ({"head_dim": 7}, "head_dim=7: must have pairs"),
        ({"kv_heads": 3}, "kv_heads=3: must divide heads=4"),
    ]:
        with pytest.raises(ValueError, match=said):
            Attention(**(fits | wrong))
