"""The cost of a model, read off the model: parameters, matmul FLOPs, bytes kept for the backward, bytes of state.

No module states its cost, so none can state it wrong: the layers run, forward and backward, on the meta device, where
nothing is computed and every matmul is seen with its shapes. A multiply-add counts as two FLOPs, and what is not a
matmul counts nothing. Two answers depend on data and are given by shape instead: softmax attention notes its arguments,
since its work grows with the documents (`AttentionCost`); and tokens are dealt evenly to experts and memories, since
without a capacity each goes to `top_k` of them whatever the router says (`Evenly`). A recurrence counts as what its
reference kernel multiplies, chunk by chunk; a fused kernel may do less or more and is credited the same.

FLOPs are those of the model, as in PaLM's utilisation (2204.02311, appendix B): what a backward pass computes again is
apart, and so is what parallel ranks add. A causal query meets only the keys that it may see; the backward of attention
is twice its forward.

Legend: B spans, T tokens, D model width, H heads, G key/value heads, K key width, V value width, N tokens, X choices.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from models.dispatch import Here, Sent
from models.kernels.chunking import Effect
from models.kernels.grouped_ffn import mixture
from models.kernels.indexed_attention import Index, Selected, packed
from models.lm import LM
from models.mixers.mom import MixtureOfMemories
from models.moe import Beside, Experts, MoE
from models.nonlinear_recurrence import Serial
from models.recompute import Tape, kept
from models.recurrence import Recurrence
from models.sequence import Memory, Whole

TOKENS = 256  # that the model is run on: whole chunks of every kernel


class AttentionCost(NamedTuple):
    """The work of one softmax layer: FLOPs a pair of a query and a key, bytes that a token leaves to those after it.

    A query meets the last `window` keys of its document, its own included (None: all), and the first `sinks`.
    """

    flops: int
    bytes: int
    window: int | None = None
    sinks: int = 0

    def pairs(self, length: int) -> int:
        """Queries of a document of this length times the keys that each meets."""
        if self.window is None or length <= self.window:
            return length * (length + 1) // 2
        beyond = length - self.window
        return _triangle(length, self.window) + _triangle(beyond, self.sinks)

    def held(self, context: int) -> int:
        """Keys that are held for the token after `context` others."""
        if self.window is None:
            return context
        return min(context, max(self.window - 1, self.sinks)) + self.sinks


class Flops(NamedTuple):
    """Matmul FLOPs. `recompute` is what a backward pass runs again when it keeps only each layer's input."""

    forward: float
    backward: float
    recompute: float

    @property
    def model(self) -> float:
        """Counts the FLOPs that training needs, without recomputation."""
        return self.forward + self.backward


class LayerWork(NamedTuple):
    """The work of one layer on a token: matmul FLOPs, without what attention does on pairs, and that attention."""

    per_token: Flops
    attention: tuple[AttentionCost, ...]

    def flops(self, length: int) -> float:
        """The FLOPs of training on a token of documents of this length, without recomputation."""
        return self.per_token.model + sum(3 * each.flops * each.pairs(length) / length for each in self.attention)


@dataclass(frozen=True, kw_only=True)
class Account:
    """The costs of a model; bytes in the dtypes that it computes in."""

    parameters: int
    embedding: int  # of them, rows that are looked up and multiply nothing; 0 where the head multiplies them too
    activated: int  # that act on a token: one row of such an embedding, of the experts those that it goes to
    per_token: Flops  # without what attention does on pairs of tokens
    layers: tuple[LayerWork, ...]
    head: float  # FLOPs that training needs for a token's logits; looking up its embedding takes none
    ahead: tuple[LayerWork, ...] = ()  # modules of multi-token prediction, with their logits: training alone runs them
    attention: tuple[AttentionCost, ...]  # a softmax layer each, without those of `ahead`
    activations: float  # bytes a token that the layers keep for the backward
    dear: float  # bytes a token of the results that they keep besides their inputs where the rest is computed again
    recurrent: int  # bytes a sequence: states and convolution tails, whatever its length

    def flops(self, lengths: Iterable[int]) -> Flops:
        """FLOPs of documents of these lengths, packed in any way."""
        documents = Counter(lengths)
        layers = Counter([*self.attention, *(each for module in self.ahead for each in module.attention)])
        on_pairs = sum(
            times * layer.flops * count * layer.pairs(length)
            for layer, times in layers.items()
            for length, count in documents.items()
        )
        tokens = sum(length * count for length, count in documents.items())
        forward, backward, recompute = (tokens * flops for flops in self.per_token)
        return Flops(forward + on_pairs, backward + 2 * on_pairs, recompute + on_pairs)

    def state(self, context: int) -> int:
        """Bytes that continuing one sequence takes after `context` tokens."""
        return self.recurrent + sum(layer.bytes * layer.held(context) for layer in self.attention)


def _triangle(count: int, most: int) -> int:
    """Σ_{t=1..count} min(t, most)."""
    least = min(count, most)
    return least * (least + 1) // 2 + (count - least) * least


def account(model: LM, *, device: str = "cpu") -> Account:
    """The costs of a model on the meta device, computing in `model.compute` on a `device`: layers alike are run once.

    The device's type decides in what form experts run: that changes the bytes that they keep, and no FLOP.

    Raises ValueError for a model on another device, NotImplementedError for a layer whose course depends on data.
    """
    if model.embedding.device.type != "meta":
        raise ValueError(f"model: is on {model.embedding.device.type}; must be on the meta device to be accounted for")
    known: dict[Any, _Layer] = {}
    rows, layers = model.coupled(), []
    for kind, (name, layer) in zip(model.kinds, model.layers.items(), strict=True):
        sums = model.depths[int(name)].sums
        alike = (kind, sums, *(p.shape for p in layer.parameters()))
        if alike not in known:
            given = dict(rows.get(name, {}))
            shape = model.depths[int(name)].stream(1, TOKENS, model.dim)
            if sums:
                given["past"] = torch.empty((sums, *shape), dtype=model.compute, device="meta", requires_grad=True)
            try:
                known[alike] = _run(layer, model, device, given, shape)
            except RuntimeError as error:  # what the meta device cannot do
                line = (str(error).splitlines() or [""])[0]
                raise NotImplementedError(f"costs of layers.{name} ({kind}): {line}") from error
        layers.append(known[alike])
    modules = [_module(name, model, device) for name in model.mtp]
    forward, backward = (sum(getattr(e, way) for e in (*layers, *modules)) for way in ("forward", "backward"))
    vocabulary, dim = model.embedding.shape
    head = 2 * vocabulary * dim
    heads = head * (1 + len(modules))
    looked_up = vocabulary * dim if model.head is not None else 0
    parameters = sum(p.numel() for p in model.parameters())
    return Account(
        parameters=parameters,
        embedding=looked_up,
        activated=parameters - idle(model) - (looked_up and looked_up - dim),
        per_token=Flops(forward / TOKENS + heads, backward / TOKENS + 2 * heads, forward / TOKENS),
        layers=tuple(e.work() for e in layers),
        head=3.0 * head,
        ahead=tuple(e.work(head) for e in modules),
        attention=tuple(attention for each in layers for attention in each.attention),
        activations=sum(each.kept for each in (*layers, *modules)) / TOKENS,
        dear=sum(each.dear for each in (*layers, *modules)) / TOKENS,
        recurrent=sum(each.recurrent for each in layers),
    )


def idle(model: nn.Module) -> int:
    """Parameters of the experts, and of the memories, that a token does not go to."""
    several: list[tuple[nn.Module, int, int]]
    several = [(m.experts, m.num_experts, m.top_k) for m in model.modules() if isinstance(m, MoE)]
    several += [(m.memories, len(m.memories), m.top_k) for m in model.modules() if isinstance(m, MixtureOfMemories)]
    return sum(sum(p.numel() for p in each.parameters()) // count * (count - k) for each, count, k in several)


class _Layer(NamedTuple):
    """The work of a layer on TOKENS tokens: FLOPs, softmax attention, bytes kept for the backward, the dear ones of
    them (`models.recompute`), bytes of state."""

    forward: int
    backward: int
    attention: tuple[AttentionCost, ...]
    kept: int
    dear: int
    recurrent: int

    def work(self, head: int = 0) -> LayerWork:
        """The work on a token, with that of a head in front."""
        forward, backward = self.forward / TOKENS, self.backward / TOKENS
        return LayerWork(Flops(forward + head, backward + 2 * head, forward), self.attention)


def _module(name: str, model: LM, device: str) -> _Layer:
    """A module of multi-token prediction, without its head."""
    embedded_BTD = torch.empty(1, TOKENS, model.embedding.shape[1], dtype=model.compute, device="meta")
    try:
        return _run(model.mtp[name], model, device, {"embedded_BTD": embedded_BTD.requires_grad_()}, embedded_BTD.shape)
    except RuntimeError as error:
        line = (str(error).splitlines() or [""])[0]
        raise NotImplementedError(f"costs of mtp.{name}: {line}") from error


def _run(layer: nn.Module, model: LM, device: str, rows: dict[str, Any], shape: tuple[int, ...]) -> _Layer:
    """shape: of the layer's input."""
    x_BTD = torch.empty(shape, dtype=model.compute, device="meta", requires_grad=True)
    parameters = list(layer.parameters())
    saved = _SavedBytes(parameters)
    seq, remembering = Traced.of_length(TOKENS), Traced.of_length(TOKENS, memory := Memory())
    with by_shape(layer, device):
        with saved.hooks, FlopCounterMode(display=False) as forward:
            y_BTD, *_ = layer(x_BTD, seq, **rows)
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(y_BTD.sum(), [x_BTD, *parameters], allow_unused=True)
        with torch.no_grad(), (tape := Tape()).recording():
            layer(x_BTD, remembering, **rows)
    states = [x for x in tree_leaves(memory.leaving) if isinstance(x, Tensor)]
    return _Layer(
        forward.get_total_flops(),
        backward.get_total_flops(),
        tuple(seq.attention),
        saved.bytes,
        tape.bytes,
        sum(x.numel() * x.itemsize for x in states),
    )


@dataclass(kw_only=True)
class Traced(Whole):
    """One document on the meta device, which notes what softmax attention is asked. shared: with other devices, so that
    states enter from there."""

    attention: list[AttentionCost] = field(default_factory=list)
    shared: bool = False

    @classmethod
    def of_length(cls, tokens: int, memory: Memory | None = None, *, shared: bool = False) -> "Traced":
        positions = torch.arange(tokens, device="meta").unsqueeze(0)
        return cls(
            positions=positions,
            documents=torch.zeros_like(positions),
            num_documents=1,
            counted=torch.ones_like(positions, dtype=torch.bool),
            memory=memory,
            shared=shared,
        )

    def scan(self, recurrence: Recurrence | Serial, *xs: Tensor, slot: str) -> Tensor:
        if not self.shared or isinstance(recurrence, Serial):
            return super().scan(recurrence, *xs, slot=slot)
        begun = recurrence.begin(*xs, starts=self.starts)
        entering = _Cross.apply(*begun.effect)
        begun.ahead()
        return begun.finish(entering)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        slot: str,
        window: int | None = None,
        sinks: int = 0,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        values_in_keys: bool = False,
    ) -> Tensor:
        (H, K), (G, V) = q.shape[2:], v.shape[2:]
        self.attention.append(AttentionCost(2 * H * (K + V), G * (K + V) * k.itemsize, window, sinks))
        return _Attend.apply(
            q, k.clone(), v.clone(), sink_logits
        )  # they are joined to those of the past, wherever that is

    def attend_selected(self, q: Tensor, k: Tensor, v: Tensor, index: Index, *, slot: str) -> Selected:
        (H, K), (G, V), width = q.shape[2:], v.shape[2:], index.k.shape[-1]
        scored = 2 * (index.q[0, 0].numel() + index.q.shape[2])
        self.attention.append(AttentionCost(scored, (G * (K + V) + width) * k.itemsize))  # every key is scored
        self.attention.append(AttentionCost(2 * H * (K + V), 0, None if index.dense else index.top_k))
        keys, values = packed(k, v, index.k)
        return Selected(*_Select.apply(q, keys, values, index.q, index.weights, V))


class _Attend(torch.autograd.Function):
    """The shapes of fused attention, and what it keeps: its inputs, its output, a logsumexp a query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None) -> Tensor:
        out, lse = kept(
            lambda: (q.new_empty((*q.shape[:3], v.shape[-1])), q.new_empty(q.shape[:3], dtype=torch.float32))
        )
        ctx.save_for_backward(q, k, v, sink, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return tuple(None if x is None else torch.empty_like(x) for x in ctx.saved_tensors[:4])


class _Select(torch.autograd.Function):
    """The shapes of attention to selected keys, which keeps its inputs; its softmax is computed again."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, keys: Tensor, values: Tensor, index_q: Tensor, weights: Tensor, width: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, keys, values, index_q, weights)
        return q.new_empty((*q.shape[:3], width)), q.new_empty(q.shape[:2], dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*(torch.empty_like(x) for x in ctx.saved_tensors), None)


class _Cross(torch.autograd.Function):
    """The shapes of a state that enters from other devices: it is kept beside the effect that they are sent."""

    @staticmethod
    def forward(ctx: Any, *effect: Tensor) -> Tensor:
        entering = torch.empty_like(Effect(*effect).U)
        ctx.save_for_backward(*effect, entering)
        return entering

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *effect, _ = ctx.saved_tensors
        return tuple(torch.empty_like(x) if x.is_floating_point() else None for x in effect)


class Evenly(Here):
    """A `Dispatch` that deals the tokens out without looking: as many rows, in the same shapes."""

    def send(self, x: Tensor, experts: Tensor, num_experts: int, room: int | None) -> Sent:
        rows = x.repeat_interleave(experts.shape[1], dim=0)
        # On the CPU, since the loop over experts, where it stands in for a fused matmul, reads them.
        ends = torch.arange(1, num_experts + 1, device="cpu") * len(rows) // num_experts
        return Sent(rows, ends.to(torch.int32), torch.empty(len(rows), dtype=torch.long, device=x.device))

    def collect(self, rows: Tensor, sent: Sent, weights: Tensor) -> Tensor:
        N, X = weights.shape
        return (rows.view(N, X, -1) * weights.unsqueeze(-1).to(rows.dtype)).sum(1)


@contextlib.contextmanager
def by_shape(layer: nn.Module, device: str) -> Iterator[None]:
    """Experts are given tokens, and multiply them, by shape alone."""
    moes = [(m, m.dispatch) for m in layer.modules() if isinstance(m, MoE)]
    for moe, _ in moes:
        moe.dispatch = Evenly()
        if device == "cpu":
            moe.experts.forward = partial(_in_turn, moe.experts)  # type: ignore[method-assign]
    try:
        with _Ungrouped():
            yield
    finally:
        for moe, dispatch in moes:
            moe.dispatch = dispatch
            vars(moe.experts).pop("forward", None)


def _in_turn(
    experts: Experts,
    x_ND: Tensor,
    choices_NX: Tensor,
    weights_NX: Tensor,
    dispatch: Evenly,
    beside: Beside,
    room: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Runs one expert after another, as `Experts` do on a CPU."""
    sent = dispatch.send(x_ND, choices_NX, experts.num_experts, room)
    if experts.low is not None:
        outputs = experts.transform(sent, experts.gate_up, experts.down, dispatch)
        return dispatch.collect(outputs, sent, weights_NX), beside()
    if experts.form != "swiglu" or experts.gate_up_bias is not None:
        gate_up, down = experts.gate_up.to(x_ND.dtype), experts.down.to(x_ND.dtype)
        return dispatch.collect(experts.transform(sent, gate_up, down, dispatch), sent, weights_NX), beside()
    sizes = sent.offsets.diff(prepend=sent.offsets.new_zeros(1)).tolist()
    weights = (experts.gate_up.to(x_ND.dtype), experts.down.to(x_ND.dtype))
    return mixture(x_ND, weights_NX, sent.order, sizes, *weights), beside()


class _SavedBytes:
    """Bytes of the storages that autograd saves, each once, parameters not counted."""

    def __init__(self, parameters: Iterable[Tensor]):
        self.seen = {p.untyped_storage()._cdata for p in parameters}
        self.alive: list[torch.UntypedStorage] = []  # an address names a storage only as long as that lives
        self.bytes = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.alive.append(storage)
            self.bytes += storage.nbytes()
        return tensor


class _Ungrouped(TorchFunctionMode):
    """The fused matmul of groups of rows, whose meta kernel knows bf16 only, as one product of as many FLOPs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._grouped_mm:
            return args[0] @ args[1][0]
        return func(*args, **(kwargs or {}))
