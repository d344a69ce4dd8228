"""Conversion of a trained model: some layers of softmax attention become linear mixers, which begin from its weights,
or keep a window of it, with such a mixer beside.

`converted` says what the model is then, `write` makes its first checkpoint, a parameter at a time: ranks have no part
in it, and whatever layout trains the model loads it as any other. All that is no mixer of a converted layer stays as it
was, to the bit.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.axes import declarations, initial
from models.hub.architecture import Node, node
from models.lm import LM
from models.mixers import MIXERS
from models.mixers.attention import Attention
from train.checkpoints import checkpoint
from train.checkpoints.hf_convert import take
from train.distill_settings import ConvertSettings
from train.instantiate import construct


def built(model: Node) -> LM:
    """A `model` section's model on the meta device."""
    with torch.device("meta"):
        lm: LM = construct(model)
    return lm


def converted(model: Node, settings: ConvertSettings) -> tuple[Node, list[int]]:
    """The `model` section after a conversion, and the layers that it converts. Raises ValueError, a line that begins
    with the key."""
    lm = built(model)
    layers = _layers(lm, settings)
    blocks, kinds, names = dict(model["blocks"]), list(lm.kinds), dict[str, str]()
    for i in layers:
        kind = kinds[i]
        if kind not in names:
            name = names[kind] = _free(f"{kind}_{settings.mixer or 'window'}", blocks)
            blocks[name] = _block(lm.layers[str(i)], blocks[kind], settings)
        kinds[i] = names[kind]
    blocks = {name: block for name, block in blocks.items() if name in kinds}
    return {**model, "pattern": _shortest(kinds), "blocks": blocks}, layers


def _block(layer: Any, before: Node, settings: ConvertSettings) -> Node:
    """The section of a converted layer. before: its section before."""
    linear = None if settings.mixer is None else _like(layer.mixer, _mixer(settings), settings)
    if settings.window is None:
        return {**before, "mixer": linear}
    block = {**before, "mixer": {**before["mixer"], "window": settings.window}}
    if linear is None:
        return block
    if layer.beside is not None:
        name = type(layer.beside).__name__
        raise ValueError(f"convert.window={settings.window}: must be null: {name} stands beside the attention already")
    return {**block, "beside": linear}


def part_of(settings: ConvertSettings) -> str | None:
    """The part of a converted layer that is the linear mixer: mixer or beside; None without one."""
    return None if settings.mixer is None else "mixer" if settings.window is None else "beside"


def _mixer(settings: ConvertSettings) -> Any:
    able = [name for name, kind in MIXERS.items() if getattr(kind, "INHERITS", False)]
    if settings.mixer not in able:
        raise ValueError(
            f"convert.mixer={settings.mixer}: must be one of {', '.join(sorted(able))}: no other can begin from the "
            "weights of softmax attention"
        )
    return MIXERS[settings.mixer]


def candidates(lm: LM, settings: ConvertSettings) -> list[int]:
    """The layers that may be converted, by their numbers: softmax attention that sees farther than the window."""
    softmax = [i for i, layer in enumerate(lm.layers.values()) if isinstance(layer.mixer, Attention)]
    if not softmax:
        raise ValueError(f"{settings.override}: must be null: no layer of the model is softmax attention")
    if settings.mixer is not None:
        _mixer(settings)
    if (window := settings.window) is None:
        return softmax
    seen = {i: _window(lm.layers[str(i)]) for i in softmax}
    far = [i for i in softmax if (own := seen[i]) is None or own > window]
    if not far:
        raise ValueError(f"convert.window={window}: must be less than that of the attention in every layer")
    return far


def _window(layer: Any) -> int | None:
    window: int | None = layer.mixer.window
    return window


def staying(settings: ConvertSettings, layers: list[int], scores: list[float] | None = None) -> list[int]:
    """The layers that stay of `layers`, where `keep` does not name them: as many as `every` says.

    scores: of each layer, for `by=score`.
    """
    last = [i for n, i in enumerate(layers) if (n + 1) % settings.every == 0]
    if scores is None:
        return last
    order = sorted(range(len(layers)), key=lambda n: -scores[n])
    return sorted(layers[n] for n in order[: len(last)])


def _layers(lm: LM, settings: ConvertSettings) -> list[int]:
    """The layers to convert, by their numbers."""
    able = candidates(lm, settings)
    numbers = ", ".join(map(str, able))
    for i in settings.keep or ():
        if i not in able:
            raise ValueError(f"convert.keep={settings.keep}: must be some of {numbers}, the layers of attention")
    keep, key = settings.keep, f"convert.keep={settings.keep}"
    if keep is None:
        keep, key = staying(settings, able), f"convert.every={settings.every}"
    layers = [i for i in able if i not in keep]
    if not layers:
        raise ValueError(f"{key}: must leave a layer to convert, of the layers {numbers}")
    return layers


def _like(attention: Any, make: Any, settings: ConvertSettings) -> Node:
    """The node of a mixer as wide as this attention. Raises ValueError for an option that the mixer does not take."""
    own = make.like(attention.projections().shape)
    known = [key for key in inspect.signature(make).parameters if key not in ("dim", "depth", *own)]
    for key in settings.options:
        if key in own:
            raise ValueError(f"convert.options.{key}: must not be given: it is that of the attention, {own[key]:g}")
        if key not in known:
            raise ValueError(f"convert.options.{key}: no such option of {settings.mixer}; accepts {', '.join(known)}")
    try:
        with torch.device("meta"):
            make(dim=attention.q.weight.shape[1], **own, **settings.options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"convert.options.{error}") from None
    return node(make, **own, **settings.options)


def _free(name: str, blocks: Node) -> str:
    return name if name not in blocks else _free(f"{name}_", blocks)


def _shortest(kinds: list[str]) -> list[str]:
    """The shortest pattern whose repetition gives these kinds."""
    n = len(kinds)
    return next(kinds[:p] for p in range(1, n + 1) if all(kinds[i] == kinds[i % p] for i in range(n)))


def lost(model: Node, layers: list[int], converted_model: Node, settings: ConvertSettings) -> list[str]:
    """Parameters of converted layers' attention that nothing begins from, by name. converted_model: of `converted`."""
    before, after = built(model), built(converted_model)
    names: list[str] = []
    if settings.window is not None:
        return names
    for i in layers:
        taken = {"q.weight", "kv.weight", "out.weight"}
        attention: Any = before.layers[str(i)].mixer
        linear: Any = after.layers[str(i)].mixer
        if "gate.weight" in linear.inherited(attention.projections()):
            taken.add("gate.weight")
        names += [f"layers.{i}.mixer.{name}" for name, _ in attention.named_parameters() if name not in taken]
    return names


class ConvertedWeights:
    """The parameters of a converted model, for `hf_convert.take`: each is read or made when its turn comes.

    path: the checkpoint, or folder of Hugging Face's, of the model before. part: of a layer, that is the linear mixer:
    of `part_of`. seed: of the parameters that begin anew.
    """

    def __init__(self, path: Path, before: Node, after: Node, layers: list[int], seed: int, part: str | None = "mixer"):
        self.path, self.layers, self.seed, self.part = path, layers, seed, part
        self.before, self.after = built(before), built(after)
        facts = checkpoint.manifest(path)
        self.order, self._held = facts.get("order"), {name: dtype for name, (_, dtype) in facts["model"].items()}
        self._declared = declarations(self.after)
        parameters = {name: tuple(p.shape) for name, p in self.after.named_parameters()}
        stored = checkpoint.tensors(path)  # a router's bias is no parameter
        buffers = {name: tuple(b.shape) for name, b in self.after.named_buffers() if name in stored}
        self.shapes = parameters | buffers
        self.dtypes = {name: getattr(torch, self._dtype(name)) for name in self.shapes}
        self._inherited = lru_cache(maxsize=1)(self._begun)
        self._value = lru_cache(maxsize=1)(self._of)

    def _dtype(self, name: str) -> str:
        """That of the parameter before, or of what the converted layer had."""
        if name in self._held:
            return self._held[name]
        layer = name.split(".")[1] if self._layer(name) is not None else None
        return self._held.get(f"layers.{layer}.mixer.q.weight", "float32")

    def _layer(self, name: str) -> int | None:
        """The converted layer whose linear mixer has this parameter."""
        return next((i for i in self.layers if name.startswith(f"layers.{i}.{self.part}.")), None)

    def stretches(self, name: str) -> Iterator[tuple[int, int]]:
        return iter([(0, self.shapes[name][0])])

    def read(self, name: str, begin: int, end: int) -> Tensor:
        """Rows [begin, end) of a parameter."""
        return self._value(name)[begin:end]

    def manifest(self) -> dict[str, Any]:
        """Returns what the checkpoint's manifest says of the model."""
        dtypes = {name: str(self.dtypes[name]).removeprefix("torch.") for name in self._declared}
        facts = {"model": {name: [list(self.shapes[name]), dtype] for name, dtype in dtypes.items()}}
        return facts if self.order is None else facts | {"order": self.order}

    def _of(self, name: str) -> Tensor:
        i = self._layer(name)
        if i is None:
            return self._stored(name, self.shapes[name], self.dtypes[name])
        own = name.removeprefix(f"layers.{i}.{self.part}.")
        value = self._inherited(i).get(own)
        if value is None:
            value = initial(self.seed, name, self._declared[name], self.shapes[name])
        if tuple(value.shape) != self.shapes[name]:
            raise ValueError(f"{name} begins as {list(value.shape)}, must be {list(self.shapes[name])}")
        return value.to(self.dtypes[name])

    def _begun(self, i: int) -> dict[str, Tensor]:
        attention: Any = self.before.layers[str(i)].mixer
        attention.to_empty(device="cpu")
        with torch.no_grad():
            for name, p in attention.named_parameters():
                whole = f"layers.{i}.mixer.{name}"
                p.copy_(self._stored(whole, tuple(p.shape), getattr(torch, self._held[whole])))
            linear: Any = getattr(self.after.layers[str(i)], str(self.part))
            values: dict[str, Tensor] = linear.inherited(attention.projections())
            if self.part == "beside":  # so that the model begins as the one whose attention sees the window alone
                values["out.weight"] = torch.zeros_like(values["out.weight"])
        attention.to("meta")
        return values

    def _stored(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        value = torch.empty(shape, dtype=dtype)
        checkpoint.read({"model": {name: value}}, self.path, alone=True)
        return value


def write(weights: ConvertedWeights, run: Path, companions: dict[str, str], watch: Callable[[str], None]) -> Path:
    """Writes a converted model as `run`, a run of no steps, which must not exist. Returns its checkpoint."""
    return take(weights, run, companions, watch)
