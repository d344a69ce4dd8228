"""The plain model in one process: no process group, no plan, no sharding, one document at a time.

Nothing of `parallel/` is here, and of `train/` only the description of the run: the loss, clipping and the optimizers'
steps are written down again, so that a fault of those cannot be on both sides.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.axes import Declared, declarations, initialise
from models.kernels.newton_schulz import newton_schulz
from models.moe import mixtures
from models.mtp import Ahead
from models.sequence import Whole
from train.run_config import RunConfig
from train.verify.documents import Document, EdgeBatches
from train.verify.trace import Moment, Streams, Trace, written

PERTURBATION = 1e-14  # of each weight


def trace(config: RunConfig, steps: int, *, packed: bool = False, perturbed: int | None = None) -> Trace:
    """The trace of the run's first steps, all of it in this process, fp64.

    packed: reads the documents of a sequence end to end: faster. perturbed: changes every first weight by some parts
    in 10^14, drawn by this number.
    """
    model = config.model.build().double()
    model.compute, model.loss_chunk = torch.float64, None
    initialise(model, config.seed)
    _narrow(model, config)
    if perturbed is not None:
        generator = torch.Generator().manual_seed(perturbed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.mul_(1 + PERTURBATION * noise)
    batches = config.data.build().open(0, None)
    stepper, streams, result = _Stepper(config, model), Streams(model.layers), Trace()
    for step in range(steps):
        result |= written(step, _step(config, model, batches, stepper, streams, step, packed))
    return result


def _step(
    config: RunConfig, model: Any, batches: EdgeBatches, stepper: "_Stepper", streams: Streams, step: int, packed: bool
) -> Moment:
    train, sequences = config.train, batches.documents(config.seed, step)
    rows = sequences if packed else [[document] for documents in sequences for document in documents]
    every = [document for documents in sequences for document in documents]
    targets = sum(int((document.targets >= 0).sum()) for document in every)
    tokens, weight = sum(len(document.tokens) for document in every), train.mtp_weight / max(model.mtp_layers, 1)
    modules = range(1, model.mtp_layers + 1)
    targets_ahead = [sum(int((d.targets[k:] >= 0).sum()) for d in every) for k in modules]
    nats, balance, z, indices, loads, further = 0.0, 0.0, 0.0, 0.0, dict[str, Tensor](), [0.0] * len(modules)
    for row in rows:
        ahead = _ahead(row, model.mtp_layers)
        whole = _whole(row)
        whole.index_losses.weight = train.index_weight / max(tokens, 1)
        output = model(_joined(row, "tokens"), whole, ahead=ahead)
        indices += 0.0 if output.index_loss is None else output.index_loss.item()
        wanted = _joined(row, "targets").flatten()
        part = F.cross_entropy(output.logits.flatten(0, 1), wanted, ignore_index=-100, reduction="sum")
        routers = train.balance_weight * output.balance + train.z_weight * output.z
        objective = part / max(targets, 1) + routers / max(tokens, 1)
        for k, count in enumerate(targets_ahead):
            assert ahead is not None
            wanted = ahead.targets[k].flatten()
            more = F.cross_entropy(output.ahead[k].flatten(0, 1), wanted, ignore_index=-100, reduction="sum")
            objective, further[k] = objective + weight * more / max(count, 1), further[k] + more.item()
        objective.backward()
        nats, balance, z = nats + part.item(), balance + output.balance.item(), z + output.z.item()
        loads = {name: loads.get(name, 0) + load for name, load in output.load.items()}
    named = dict(model.named_parameters())
    gradients = {name: _gradient(p).clone() for name, p in named.items()}
    norm = stepper.clip(named)
    clipped = {name: _gradient(p).clone() for name, p in named.items()}
    stepper.step(named)
    for name, counts in loads.items():
        mixtures(model)[name].router.settle(counts)
    scalars = {"loss": nats / max(targets, 1), "balance loss": balance / tokens, "z loss": z / tokens}
    if indices:
        scalars["index loss"] = indices / tokens
    if modules:
        means = [n / max(count, 1) for n, count in zip(further, targets_ahead, strict=True)]
        scalars["mtp loss"] = sum(means) / len(modules)
    weights = {name: p.detach().clone() for name, p in named.items()}
    shares = {name: counts.double() / counts.sum().clamp_min(1) for name, counts in loads.items()}
    return Moment(streams.take(), scalars | {"gradient norm": norm}, shares, gradients, clipped, weights)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _joined(documents: list[Document], name: str) -> Tensor:
    return torch.cat([torch.from_numpy(getattr(document, name)) for document in documents])[None]


def _ahead(documents: list[Document], modules: int) -> Ahead | None:
    """The tokens and the targets 1, 2 … tokens on, each document by itself."""
    if not modules:
        return None
    found: tuple[list[Tensor], list[Tensor]] = [], []
    for k in range(1, modules + 1):
        for name, missing, values in zip(("tokens", "targets"), (-1, -100), found, strict=True):
            rows = [torch.from_numpy(getattr(document, name)) for document in documents]
            shifted = [torch.cat((row[k:], torch.full((min(k, len(row)),), missing))) for row in rows]
            values.append(torch.cat(shifted)[None])
    return Ahead(*(torch.stack(values) for values in found))


def _whole(documents: list[Document]) -> Whole:
    lengths = [len(document.tokens) for document in documents]
    return Whole(
        positions=torch.cat([torch.arange(n) for n in lengths])[None],
        documents=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None],
        num_documents=len(lengths),
        counted=torch.ones(1, sum(lengths), dtype=torch.bool),
        identities=[document.key for document in documents],
    )


def _narrow(model: Any, config: RunConfig) -> None:
    """Has head and routers start as those of a model of another width than that which the rate suits."""
    if config.optimizer.get("transfer", "none") == "none":
        return
    factor = (config.optimizer["base_width"] / model.dim) ** 0.5
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name == "head.weight" or declarations(model)[name].axes == ("expert", "embed"):
                p.mul_(factor)


class _Stepper:
    """Clipping and the optimizer, for whole weights: AdamW (1711.05101), Muon (2502.16982), or one of torch's."""

    def __init__(self, config: RunConfig, model: nn.Module):
        self.train, self.node = config.train, config.optimizer
        self.declared, self.dim = declarations(model), config.model["dim"]
        self.state: dict[str, dict[str, Tensor]] = {}
        self.count = 0
        self.muon = self.node.target.endswith(".Muon")
        self.other: Any = None
        if not self.node.target.startswith("train.optim."):
            decaying = [p for name, p in model.named_parameters() if self.declared[name].decay]
            rest = [p for name, p in model.named_parameters() if not self.declared[name].decay]
            self.other = self.node.build()([{"params": decaying}, {"params": rest, "weight_decay": 0.0}])

    def clip(self, named: Mapping[str, nn.Parameter]) -> float:
        """Clips in place: elements, then weights, then all together. Returns the norm as it was."""
        gradients, train = [p.grad for p in named.values() if p.grad is not None], self.train
        before = _norm(gradients)
        for gradient in gradients:
            if train.clip_value is not None:
                gradient.clamp_(-train.clip_value, train.clip_value)
            if train.clip_each is not None:
                gradient.mul_(min(1.0, train.clip_each / (float(gradient.norm()) + 1e-6)))
        factor = min(1.0, train.clip / (_norm(gradients) + 1e-6))
        for gradient in gradients:
            gradient.mul_(factor)
        return before

    @torch.no_grad()
    def step(self, named: Mapping[str, nn.Parameter]) -> None:
        """Updates every weight from its gradient, and takes the gradient off."""
        self.count += 1
        if self.other is not None:
            self.other.step()
        for name, parameter in named.items():
            if self.other is None and parameter.grad is not None:
                self._update(name, parameter, parameter.grad)
            parameter.grad = None

    def _update(self, name: str, p: Tensor, gradient: Tensor) -> None:
        declared, node = self.declared[name], self.node
        axes = {axis for axis in declared.axes if axis is not None}
        lr = node["lr"] * math.prod(rate for axis, rate in (node.get("rates") or {}).items() if axis in axes)
        decays = declared.decay and not axes & set(node.get("no_decay") or ())
        p.mul_(1 - lr * (node.get("weight_decay", 0.1) if decays else 0.0))
        lr *= self._of_width(name, declared, p, axes)
        state = self.state.setdefault(name, {})
        if self.muon and self._is_matrix(declared, p, axes):
            mean = state.setdefault("mean", torch.zeros_like(p))
            momentum = node.get("momentum", 0.95)
            mean.mul_(momentum).add_(gradient, alpha=1 - momentum)
            if node.get("nesterov", True):
                mean = momentum * mean + (1 - momentum) * gradient
            for place in _matrices(declared, p):
                matrix = mean[place]
                size = 0.2 * math.sqrt(max(matrix.shape))
                p[place] = p[place] - lr * size * newton_schulz(matrix, node.get("steps", 5))
            return
        first, second = (state.setdefault(key, torch.zeros_like(p)) for key in ("first", "second"))
        beta, gamma = node.get("betas", (0.9, 0.95))
        first.mul_(beta).add_(gradient, alpha=1 - beta)
        second.mul_(gamma).addcmul_(gradient, gradient, value=1 - gamma)
        spread = second
        if node.get("amsgrad", False):
            spread = state["largest"] = torch.maximum(state.get("largest", second), second)
        root = (spread / (1 - gamma**self.count)).sqrt().add_(node.get("eps", 1e-8))
        p.addcdiv_(first, root, value=-lr / (1 - beta**self.count))

    def _of_width(self, name: str, declared: Declared, p: Tensor, axes: set[str]) -> float:
        """Returns the factor of a rate that width asks for (2203.03466, 2310.17813): 1 where inputs do not widen."""
        if self.node.get("transfer", "none") == "none" or name == "embedding" or not declared.decay:
            return 1.0
        if not declared.matrix:
            return 1.0
        ratio = self.dim / self.node["base_width"]
        widens = [axis in ("embed", "heads", "kv_heads", "ffn", "rank") for axis in declared.axes]
        inputs, outputs = (1, 0) if p.ndim == 2 else (1, 2)
        if not (self.muon and self._is_matrix(declared, p, axes)):
            return 1 / ratio if widens[inputs] else 1.0

        def norm(n_in: float, n_out: float) -> float:
            return math.sqrt(n_out / n_in) / math.sqrt(max(n_in, n_out))

        now = p.shape[inputs], p.shape[outputs]
        then = [n / ratio if widens[side] else n for n, side in zip(now, (inputs, outputs), strict=True)]
        return norm(*now) / norm(*then)

    def _is_matrix(self, declared: Declared, p: Tensor, axes: set[str]) -> bool:
        of_adamw = self.node.get("adamw")
        if not (declared.decay and declared.matrix and p.ndim in (2, 3)) or axes & set(of_adamw or ("vocab",)):
            return False
        return all(min(p[place].shape) > 1 for place in _matrices(declared, p))


def _matrices(declared: Declared, p: Tensor) -> list[Any]:
    """An index of each matrix in a weight: each expert's, and of each the parts that lie side by side."""
    sides = [[torch.arange(n)] for n in p.shape]
    if p.ndim == 3:
        sides[0] = [torch.tensor([i]) for i in range(p.shape[0])]
    if declared.parts:
        place = torch.arange(p.shape[declared.along]) % sum(declared.parts)
        ends = torch.tensor(declared.parts).cumsum(0).tolist()
        begins = [0, *ends[:-1]]
        sides[declared.along] = [
            ((place >= a) & (place < b)).nonzero().flatten() for a, b in zip(begins, ends, strict=True)
        ]
    if p.ndim == 2:
        return [(rows[:, None], columns) for rows in sides[0] for columns in sides[1]]
    return [(int(i), rows[:, None], columns) for i in sides[0] for rows in sides[1] for columns in sides[2]]


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(x.square().sum()) for x in tensors))
