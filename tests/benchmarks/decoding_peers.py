"""The rate at which a token is written, beside transformers, behind 1k, 4k and 64k tokens of context.

    python -m tests.benchmarks.peers decoding

Models of the same shapes and count of parameters on both sides: dense Llamas, the Qwen3-Next of
`tests.benchmarks.step`, and Mamba-2. Contexts are not read: keys, values and states are drawn at random, which costs
nothing and is as fast to write behind. transformers is what it is without extra packages, its cache and its greedy
choice included. One thread, one process, fp32; the sides write in turn, `tokens` each, and the next context's turn
comes after that. Figures are medians of processor time a token; a ratio is the median over rounds of the peer's time
over ours.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.benchmarks import step
from train.inference.decode import Decoder, Prefilled, Sampling

VOCABULARY = step.VOCABULARY
CONTEXTS = (1024, 4096, 65536)
SMALL_LLAMA = {"dim": 256, "layers": 6, "heads": 4, "kv_heads": 2, "hidden": 640}
LLAMA = {"dim": 384, "layers": 8, "heads": 6, "kv_heads": 2, "hidden": 1024}
MAMBA = {"dim": 256, "layers": 8, "heads": 8, "state": 64}
SHORT = 32  # tokens that are read, for states of the right shapes
AIM = 1.2


def lm(layers: int, dim: int, mixer: Any, ffn: Any) -> Any:
    from models.axes import initialise
    from models.block import Block
    from models.lm import LM

    blocks = {"layer": partial(Block, mixer=mixer, ffn=ffn)}
    return initialise(LM(vocabulary=VOCABULARY, dim=dim, layers=layers, pattern=["layer"], blocks=blocks), 0)


def llama(shape: dict[str, int]) -> Any:
    from models.ffn import SwiGLU
    from models.mixers.attention import Attention

    mixer = partial(Attention, heads=shape["heads"], kv_heads=shape["kv_heads"])
    return lm(shape["layers"], shape["dim"], mixer, partial(SwiGLU, hidden=shape["hidden"]))


def peer_llama(shape: dict[str, int]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=shape["dim"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"],
            intermediate_size=shape["hidden"],
            max_position_embeddings=2 * CONTEXTS[-1],
            attn_implementation="sdpa",
        )
    )


def peer_qwen3_next() -> Any:
    model = step.peer_model()
    model.config.use_cache, model.config.output_router_logits = True, False
    return model


def mamba2() -> Any:
    from models.mixers.mamba2 import Mamba2

    return lm(MAMBA["layers"], MAMBA["dim"], partial(Mamba2, heads=MAMBA["heads"], state=MAMBA["state"]), None)


def peer_mamba2() -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    return Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=VOCABULARY,
            hidden_size=MAMBA["dim"],
            num_hidden_layers=MAMBA["layers"],
            num_heads=MAMBA["heads"],
            head_dim=2 * MAMBA["dim"] // MAMBA["heads"],
            state_size=MAMBA["state"],
            n_groups=1,
            expand=2,
            tie_word_embeddings=False,
        )
    )


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "Llama": (partial(llama, LLAMA), partial(peer_llama, LLAMA)),
    "Llama, small": (partial(llama, SMALL_LLAMA), partial(peer_llama, SMALL_LLAMA)),
    "Qwen3-Next": (step.ours_model, peer_qwen3_next),
    "Mamba-2": (mamba2, peer_mamba2),
}


def ours(model: Any, context: int) -> Callable[[int], list[float]]:
    """Processor time of so many tokens behind a context."""
    from models.kv_cache import KVCache

    decoder = Decoder(model)
    read = decoder.read(list(range(SHORT)))

    def held(value: Any) -> Any:
        if not isinstance(value, KVCache):
            return value
        return KVCache(*(torch.randn(1, context, *x.shape[2:]) for x in value[:2]))

    text = Prefilled({slot: held(value) for slot, value in read.entering.items()}, context, read.logits)

    def write(tokens: int) -> list[float]:
        times: list[float] = []

        def take(row: int, token: int) -> bool:
            times.append(time.process_time())
            return True

        decoder.extend([text], tokens + 2, Sampling(temperature=0), take)
        return [b - a for a, b in zip(times[1:], times[2:], strict=False)]  # the first model call places the context

    return write


def peer(model: Any, context: int) -> Callable[[int], list[float]]:
    """The same of transformers' model, whose cache goes on growing."""
    model.eval()
    with torch.inference_mode():
        read = model(torch.arange(SHORT)[None], use_cache=True)
        cache = read["cache"]  # by this name: an older one reaches the layers of some models no more
        for layer in cache.layers:
            if isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.numel():
                layer.keys, layer.values = (
                    torch.randn(*x.shape[:2], context, x.shape[3]) for x in (layer.keys, layer.values)
                )
    token = [torch.zeros(1, 1, dtype=torch.long)]

    @torch.inference_mode()
    def write(tokens: int) -> list[float]:
        times = [time.process_time()]
        for _ in range(tokens):
            out = model(token[0], cache=cache, use_cache=True)
            token[0] = out.logits[:, -1].argmax(-1, keepdim=True)
            times.append(time.process_time())
        return [b - a for a, b in zip(times, times[1:], strict=False)]

    return write


class Compared(NamedTuple):
    """Seconds a token, and the peer's over ours: the median over rounds, the least and the most."""

    ours: float
    peer: float
    ratio: float
    low: float
    high: float


def compare(name: str, rounds: int, tokens: int) -> dict[int, Compared]:
    build, build_peer = MODELS[name]
    torch.manual_seed(0)
    mine, other = build(), build_peer()
    found = {}
    for context in CONTEXTS:
        sides = (ours(mine, context), peer(other, context))
        for write in sides:
            write(4)
        medians = [[statistics.median(write(tokens)) for write in sides] for _ in range(rounds)]
        ratios = [b / a for a, b in medians]
        times = [statistics.median(side) for side in zip(*medians, strict=True)]
        found[context] = Compared(*times, statistics.median(ratios), min(ratios), max(ratios))
        print(name, context, found[context], file=sys.stderr, flush=True)
        del sides
    return found
