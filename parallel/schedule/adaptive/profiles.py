"""Models and clusters whose costs were published: arXiv 2412.01523 and the solver that its authors released.

The constants of `flexsp_7b` and its like were fitted by them to 64 GPUs: milliseconds are seconds here, a1 counts a
pair twice, since it multiplies s², and "GB/s" are MiB a millisecond there.
"""

from dataclasses import replace

from parallel.schedule.adaptive.cost import NONE, Cluster, Layer, Model, Recompute, Wire

_MIB = 2**20
# max-sequence K tokens -> 2^30 parameters; a1 1e-6 ms, a2 1e-3 ms, launch ms, activations MiB a token
_PUBLISHED = {
    "7b": (5.128, 183.9576, 629.3563, 4.4804, 4096, 32, {4: 6.51, 192: 7.1174, 384: 7.8499}),
    "13b": (9.2852, 306.0189, 1132.5632, 4.2204, 5120, 40, {4: 12.3568, 192: 13.1161, 384: 14.0316}),
    "30b": (15.4262, 803.5742, 2789.3644, 3.4174, 6656, 60, {4: 30.538, 192: 31.5251, 384: 32.7153}),
}
_BANDWIDTH = {1: 1e10, 2: 119.54, 4: 104.07, 8: 96.5, 16: 10.33, 32: 5.94, 64: 4.87}

MODELS = ("7b", "13b", "30b")

MLP_AGAIN = Recompute("mlp", activations=0.5, tokens=1.222)
"""Assumed, not published: without the feed-forward's activations twice the tokens fit, for 22.2% more token time."""


def flexsp(size: str, context_k: int = 192, *, recompute: bool = False) -> Model:
    """The published `7b`, `13b` or `30b` with positions for 4, 192 or 384 thousand tokens."""
    if size not in MODELS:
        raise ValueError(f"model {size}: must be one of {', '.join(MODELS)}")
    a1, a2, launch, activations, width, depth, parameters = _PUBLISHED[size]
    if context_k not in parameters:
        raise ValueError(f"{context_k}K tokens: must be one of {', '.join(map(str, parameters))}")
    layer = Layer(
        count=depth,
        pair=2 * a1 * 1e-9 / depth,
        token=a2 * 1e-6 / depth,
        token_bytes=4 * 2 * width * 2,  # queries, keys, values, outputs; both directions; two bytes a number
    )
    return Model(
        name=f"{size} {context_k}K",
        layers=(layer,),
        launch=launch / 1e3,
        state_bytes=16 * parameters[context_k] * 2**30,
        activation_bytes=activations * _MIB,
        recompute=(NONE, MLP_AGAIN) if recompute else (NONE,),
    )


def hybrid(model: Model, linear: int, softmax: int, *, states: str = "scan", head: int = 128) -> Model:
    """The same model with `linear` linear layers for every `softmax` softmax layers, at equal cost a token.

    A linear layer has one state of width x `head` numbers of two bytes; linear=0 or softmax=0 leaves one kind.
    """
    (layer,) = model.layers
    width = layer.token_bytes / 16
    full = round(layer.count * softmax / (linear + softmax))
    kinds = (
        replace(layer, count=full),
        Layer(layer.count - full, token=layer.token, state_bytes=2 * width * head, states=states),
    )
    return replace(model, name=f"{model.name} {linear}:{softmax} {states}", layers=tuple(k for k in kinds if k.count))


def flexsp_cluster(ranks: int = 64, gib: float = 28) -> Cluster:
    """The published GPUs, eight a machine, with the limit that the authors plan for. Beyond 64 ranks a doubling
    takes bandwidth by the last published ratio, 4.87 to 5.94: an assumption."""
    wires = {size: Wire(value * _MIB * 1e3) for size, value in _BANDWIDTH.items()}
    size = max(wires)
    while size < ranks:
        wires[2 * size] = Wire(wires[size].bandwidth * _BANDWIDTH[64] / _BANDWIDTH[32])
        size *= 2
    return Cluster(f"{ranks} GPUs of {gib:g} GiB", ranks, gib * 2**30, wires)
