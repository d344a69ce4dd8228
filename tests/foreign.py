"""Faults that other systems had, seeded into ours by their kind: `farspan verify` must find each of them.

`make foreign` (`python -m tests.foreign`) runs all of them and the right configurations beside them; the table in
docs/verify.md is made of `rows`. A fault is a function that breaks a process for good, before anything is built.
"""

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import models.moe
import models.norm
import models.positions
import models.sequence
import parallel.fsdp
import parallel.parallelize
import parallel.sequence.place
import parallel.tensor
import tests.world
import train.execute
import train.loop
import train.loss
import train.optim.clip
from launch.config.compose import composed
from launch.verify.proof import STEPS, Reference, reference
from launch.verify.shrink import Shrunk, shrink
from models.nonlinear_recurrence import Serial
from parallel.collectives import Comm
from parallel.sequence.spread import Spread
from parallel.shards import local
from tests import mutations
from tests.world import run_world
from train.verify import world
from train.verify.trace import Difference, Verdict, compare


def backward() -> bool:
    """True while a layer runs once more for its backward pass."""
    return torch._C._current_graph_task_id() != -1


def leave_a_mixers_norm_to_each_rank() -> None:
    honest = models.norm.GatedRMSNorm.forward
    models.norm.GatedRMSNorm.forward = _first_rank_alone(honest)


def leave_norms_to_each_rank() -> None:
    models.norm.RMSNorm.forward = _first_rank_alone(models.norm.RMSNorm.forward)


def _first_rank_alone(honest: Callable[..., Any]) -> Callable[..., Any]:
    """The weight has a gradient on rank 0 only, as if nothing summed the others'."""

    def forward(self, *xs):
        if not dist.get_rank():
            return honest(self, *xs)
        weight = self._parameters.pop("weight")
        self.weight = weight.detach() + 0 * weight
        try:
            return honest(self, *xs)
        finally:
            del self.weight
            self._parameters["weight"] = weight

    return forward


def count_the_balance_loss_on_every_rank() -> None:
    honest = train.loss.LossSums.objective
    train.loss.LossSums.objective = lambda self, balance_weight, **rest: honest(
        self, balance_weight=balance_weight * dist.get_world_size(), **rest
    )


def divide_no_router_loss() -> None:
    honest = train.loss.LossSums.objective
    train.loss.LossSums.objective = lambda self, targets, tokens, **weights: (
        honest(self._replace(balance=0 * self.balance, z=0 * self.z), targets=targets, tokens=tokens, **weights)
        + weights["balance_weight"] * self.balance
    )


def divide_router_losses_by_the_micro_steps_tokens() -> None:
    honest = train.loss.LossSums.objective

    def own(self, tokens, **rest):
        choices = next(iter(self.load.values())).sum().item()
        return honest(self, tokens=max(choices, 1), **rest)

    train.loss.LossSums.objective = own


def predict_across_documents() -> None:
    def targets(placed):
        following = placed.tokens.roll(-1, dims=1)
        ends = placed.seq.positions.roll(-1, dims=1) == 0
        ends[:, -1] = False
        return replace(placed, targets=torch.where(ends, following, placed.targets))

    _replace_placed(targets)


def lose_the_last_target_of_each_span() -> None:
    def targets(placed):
        kept = placed.targets.clone()
        if isinstance(placed.seq, Spread):
            kept[:, -1] = -100
        return replace(placed, targets=kept)

    _replace_placed(targets)


def _replace_placed(change: Callable[[Any], Any]) -> None:
    honest = train.execute.place
    train.execute.place = lambda *args, **options: change(honest(*args, **options))


def take_a_packed_sequence_for_one_document_in_the_balance_loss() -> None:
    def local_sum(self, x):
        return x.flatten(0, 1).sum(0).expand(self.num_documents, *x.shape[2:]).clone()

    models.sequence.Tokens.local_sum = local_sum


def divide_document_starts_by_ranks() -> None:
    honest = Spread.scan

    def scan(self, recurrence, *xs, slot):
        true = self.starts
        moved = torch.zeros_like(true)
        rows, columns = true.nonzero(as_tuple=True)
        moved[rows, columns // self.chain.comm.size] = True
        self.__dict__["starts"] = moved
        try:
            return honest(self, recurrence, *xs, slot=slot)
        finally:
            self.__dict__["starts"] = true

    Spread.scan = scan


def average_over_a_ranks_own_targets() -> None:
    """Without any, a rank divides 0 by 0."""
    _own_mean(least=0)


def average_the_means_of_micro_steps() -> None:
    _own_mean(least=1)


def _own_mean(least: int) -> None:
    counted = [1]

    def count(placed):
        counted[0] = int((placed.targets != -100).sum())
        return placed

    _replace_placed(count)
    honest = train.loss.LossSums.objective

    def objective(self, **rest):
        mean = self.cross_entropy / torch.tensor(float(max(counted[0], least)), dtype=self.cross_entropy.dtype)
        none = self._replace(cross_entropy=0 * self.cross_entropy)
        return honest(none, **rest) + mean / dist.get_world_size()

    train.loss.LossSums.objective = objective


def leave_gradients_where_they_arise() -> None:
    def own(output, whole, group, op=None, async_op=False):
        output.copy_(whole.view(group.size(), -1)[dist.get_rank(group)].view_as(output))

    parallel.fsdp.reduce_scatter_into = own


def reduce_a_copy() -> None:
    """A tensor that a layer hands to other ranks has a gradient of its own rank alone: the sum went into a copy."""
    Comm.reduce_scatter = lambda self, x, purpose: x[self.rank].clone()


def count_positions_from_each_span() -> None:
    honest = models.positions.Positions.rotation

    def rotation(self, seq, head_dim):
        other = copy.copy(seq)
        other.positions = torch.arange(seq.positions.shape[1]).expand_as(seq.positions)
        return honest(self, other, head_dim)

    models.positions.Positions.rotation = rotation


def count_positions_through_documents() -> None:
    honest = models.positions.Positions.rotation

    def rotation(self, seq, head_dim):
        other = copy.copy(seq)
        other.positions = seq.positions + 50 * seq.documents
        return honest(self, other, head_dim)

    models.positions.Positions.places = lambda self, seq: seq.positions // 2 + seq.documents
    models.positions.Positions.rotation = rotation


def attend_across_documents() -> None:
    honest = parallel.sequence.place.SpanLayout
    parallel.sequence.place.SpanLayout = lambda comm, spans, starts: honest(comm, spans, (0,))


def run_each_ranks_recurrence_from_nothing() -> None:
    honest = Spread.scan

    def scan(self, recurrence, *xs, slot):
        if isinstance(recurrence, Serial):
            return honest(self, recurrence, *xs, slot=slot)
        return recurrence.begin(*xs, starts=self.starts).finish(None)

    Spread.scan = scan


def begin_convolutions_anew_on_each_rank() -> None:
    Spread.before = lambda self, x, width, slot: x.new_zeros(x.shape[0], width, *x.shape[2:]) + 0 * x.sum()


def leave_a_ranks_weights_as_they_are() -> None:
    honest = train.loop.apply

    def apply(optimizer, held):
        parameters = [local(p.detach()) for group in optimizer.param_groups for p in group["params"]]
        before = [p.clone() for p in parameters]
        honest(optimizer, held)
        if dist.get_rank():
            for p, kept in zip(parameters, before, strict=True):
                p.copy_(kept)

    train.loop.apply = apply


def clip_by_the_norm_of_a_shard() -> None:
    train.optim.clip.norm = lambda tensors: torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(local(x)) for x in tensors])
    )


def count_a_norm_once_a_replica() -> None:
    honest = train.optim.clip.norm
    train.optim.clip.norm = lambda tensors: honest(tensors) * dist.get_world_size() ** 0.5


def leave_vectors_out_of_the_norm() -> None:
    honest = train.optim.clip.norm
    train.optim.clip.norm = lambda tensors: honest([x for x in tensors if x.ndim > 1])


def recompute_from_another_input() -> None:
    honest = Spread.halos

    def halos(self, x, width, *, slot):
        found = honest(self, x, width, slot=slot)
        if backward():
            found.data.mul_(1 + 1e-6)  # so little that no token goes to another expert, which torch itself would see
        return found

    Spread.halos = halos


def keep_the_last_micro_steps_gradient() -> None:
    mutations.reduce_every_micro_step_and_keep_the_last()


def double_gradients_at_each_micro_step() -> None:
    honest = train.execute.communicate_gradients

    def doubling(model, last):
        for p in model.parameters():
            if (state := getattr(p, "grad", None)) is not None:
                state.mul_(2)
        for module in model.modules():
            if isinstance(module, parallel.fsdp.FSDPModule):
                for each in module._get_fsdp_state()._fsdp_param_group.fsdp_params:
                    whole = getattr(each, "_unsharded_param", None)
                    if whole is not None and whole.grad is not None:
                        whole.grad.mul_(2)
        honest(model, last)

    train.execute.communicate_gradients = doubling


def settle_routers_by_a_ranks_own_counts() -> None:
    honest = train.loop.totals

    def own(tally, *rest):
        found = honest(tally, *rest)
        return replace(found, choices={name: load.double() for name, load in tally.load.items()})

    train.loop.totals = own


def draw_other_weights_on_each_rank() -> None:
    honest = parallel.parallelize.initial
    parallel.parallelize.initial = lambda seed, *rest: honest(seed + dist.get_rank(), *rest)


def ignore_a_window_across_ranks() -> None:
    honest = Spread.attend
    Spread.attend = lambda self, q, k, v, *, slot, window=None, sinks=0: honest(self, q, k, v, slot=slot)


def forget_the_sums_over_tensor_ranks() -> None:
    train.execute.sum_undivided_gradients = lambda model: None


def look_tokens_up_in_the_wrong_rows() -> None:
    honest = parallel.tensor.embed
    parallel.tensor.embed = lambda tokens, table, first: honest(tokens, table, 0)


def count_each_replica_in_the_norm() -> None:
    def norm(tensors):
        square = torch.stack([torch.linalg.vector_norm(local(x)).square() for x in tensors]).sum()
        dist.all_reduce(square)
        return square.sqrt()

    train.optim.clip.norm = norm


def leave_gradients_to_each_replica() -> None:
    honest = train.execute.communicate_gradients

    def alone(model, last):
        honest(model, last)
        model.set_requires_all_reduce(False)

    train.execute.communicate_gradients = alone


class Foreign(NamedTuple):
    """A fault of another system.

    source: the thread or paper. fault: in our words. breaks: seeds it. overrides: the run in which it shows.
    stops: the run must end with an error of this type, by a guard of ours; any other error is a failure of the proof.
    """

    source: str
    fault: str
    breaks: Callable[[], None]
    overrides: tuple[str, ...] = ()
    stops: str = ""


TWO = ("cluster.workers=2", "parallel.sequence=2")
DATA = ("cluster.workers=2", "parallel.data=2", "scheduler.tokens_per_rank=4096")
CONTIGUOUS = (*TWO, "scheduler.layout=contiguous")
REPLICAS = ("cluster.workers=2", "parallel.replicate=2", "parallel.sequence=1")
TENSOR = ("cluster.workers=2", "parallel.tensor=2")
STEPWISE = (*CONTIGUOUS, "scheduler.tokens_per_rank=4096")
MEGATRON = "NVIDIA/Megatron-LM#"
FOREIGN: dict[str, Foreign] = {
    each.breaks.__name__: each
    for each in (
        Foreign(
            f"{MEGATRON}7452",
            "The weight of a mixer's output norm is on all ranks, and its gradient is not summed over them.",
            leave_a_mixers_norm_to_each_rank,
            TWO,
        ),
        Foreign(
            "EleutherAI/gpt-neox#1257",
            "Norms see a part of the tokens on each rank; their gradients are never added up.",
            leave_norms_to_each_rank,
            TWO,
        ),
        Foreign(
            f"{MEGATRON}7452",
            "A sum over ranks overwrites a router's own count, and the gradient of the balance loss doubles.",
            count_the_balance_loss_on_every_rank,
            TWO,
        ),
        Foreign(
            f"{MEGATRON}1532",
            "A loss beside the main one is a sum where it should be a mean.",
            divide_no_router_loss,
            TWO,
        ),
        Foreign(
            f"{MEGATRON}7213",
            "The balance loss is divided by the tokens of a micro-batch instead of those of the step.",
            divide_router_losses_by_the_micro_steps_tokens,
            DATA,
        ),
        Foreign(
            f"{MEGATRON}6115",
            "The balance loss of each document is taken over all documents of a packed sequence.",
            take_a_packed_sequence_for_one_document_in_the_balance_loss,
            TWO,
        ),
        Foreign(
            f"{MEGATRON}1464",
            "With sequences over ranks, a part of the gradient of keys and values is lost.",
            mutations.lose_a_hop_of_the_keys_gradient,
            TWO,
        ),
        Foreign(
            f"{MEGATRON}1647",
            "Targets are shifted through the border of two documents: the last token predicts the next document.",
            predict_across_documents,
            TWO,
        ),
        Foreign(
            "NVIDIA-NeMo/Automodel#3544",
            "Targets are shifted on each rank by itself: the last one of every span is lost.",
            lose_the_last_target_of_each_span,
            CONTIGUOUS,
        ),
        Foreign(
            "ISEEKYAN/Megatron-LM#111",
            "Starts of documents are divided by the number of ranks to make them local.",
            divide_document_starts_by_ranks,
            TWO,
        ),
        Foreign(
            "pytorch/torchtitan#3984, PrimeIntellect-ai/prime-rl#3003",
            "The state of a delta rule goes on from one packed document to the next.",
            mutations.ignore_document_starts_in_the_scan,
            TWO,
        ),
        Foreign(
            "PrimeIntellect-ai/prime-rl#3003",
            "A short convolution begins anew where a rank's tokens begin, in the middle of a document.",
            begin_convolutions_anew_on_each_rank,
            CONTIGUOUS,
        ),
        Foreign(
            "hiyouga/LlamaFactory#10727, huggingface/accelerate#4177",
            "Sequence parallelism reaches attention only: every rank's recurrence starts from nothing.",
            run_each_ranks_recurrence_from_nothing,
            TWO,
        ),
        Foreign(
            "huggingface/trl#6843",
            "With sequences over ranks, attention sees the documents packed before its own.",
            attend_across_documents,
            TWO,
        ),
        Foreign(
            "thunlp/Seq1F1B#6",
            "Rotary positions count from the begin of each span.",
            count_positions_from_each_span,
            CONTIGUOUS,
        ),
        Foreign(
            f"{MEGATRON}453",
            "Rotary positions ignore those that packing gave, and count by another rule.",
            count_positions_through_documents,
            TWO,
        ),
        Foreign(
            "PrimeIntellect-ai/prime-rl#2828",
            "With sequences over ranks, layers with a window attend to the whole document.",
            ignore_a_window_across_ranks,
            (*TWO, "model=samba_tiny"),
        ),
        Foreign(
            "NVIDIA-NeMo/Speech#14488",
            "The loss is a mean over a rank's own targets, and not a number where it has none.",
            average_over_a_ranks_own_targets,
            STEPWISE,
            stops="FloatingPointError",
        ),
        Foreign(
            "huggingface/transformers#35301, huggingface/accelerate#3817",
            "The loss is the mean of the micro-batches' means, however many targets each has.",
            average_the_means_of_micro_steps,
            DATA,
        ),
        Foreign(
            "DeepSpeed 0.19.8 with a mesh (1, 2), measured",
            "Gradients are not reduced over the ranks of a sequence: replicas part.",
            leave_gradients_where_they_arise,
            TWO,
        ),
        Foreign(
            "TTrace (2506.09280): loss scaling",
            "Gradients of ranks that share a sequence are averaged where they are parts of one sum.",
            mutations.forget_the_divide_factor,
            TWO,
        ),
        Foreign(
            "NovaSky-AI/SkyRL#1886",
            "The sum of a gradient over ranks goes into a copy, and the part of one rank is used.",
            reduce_a_copy,
            TWO,
        ),
        Foreign(
            f"{MEGATRON}7186, ServiceNow/Fast-LLM#550",
            "Only the last micro-batch's gradient reaches the optimizer.",
            keep_the_last_micro_steps_gradient,
            DATA,
        ),
        Foreign(
            f"{MEGATRON}6660",
            "What a buffer of gradients holds is doubled at every micro-batch.",
            double_gradients_at_each_micro_step,
            DATA,
        ),
        Foreign(
            "RLinf/RLinf#1558, areal-project/AReaL#312, pytorch/torchtitan#766",
            "Clipping uses the norm of a rank's own shards.",
            clip_by_the_norm_of_a_shard,
            TWO,
        ),
        Foreign(
            "mindspore-ai/hyper-parallel#526",
            "The norm counts what all ranks have alike as often as there are ranks.",
            count_a_norm_once_a_replica,
            TWO,
        ),
        Foreign(
            "ByteDance-Seed/VeOmni#184",
            "With replicas of the shards, the norm counts every gradient once a replica.",
            count_each_replica_in_the_norm,
            REPLICAS,
        ),
        Foreign(
            f"{MEGATRON}7186, of hybrid sharding",
            "Replicas of the shards keep their gradients to themselves.",
            leave_gradients_to_each_replica,
            REPLICAS,
        ),
        Foreign(
            f"{MEGATRON}1446",
            "Tensor ranks have tokens of their own between layers; what they share is not summed over them.",
            forget_the_sums_over_tensor_ranks,
            TENSOR,
        ),
        Foreign(
            "TTrace (2506.09280): embedding mask",
            "A tensor rank takes tokens of another's rows of the vocabulary for its own.",
            look_tokens_up_in_the_wrong_rows,
            TENSOR,
        ),
        Foreign(
            f"{MEGATRON}7452",
            "Some weights are left out of the norm that gradients are clipped by.",
            leave_vectors_out_of_the_norm,
            TWO,
        ),
        Foreign(
            "TTrace (2506.09280): parameter update",
            "A rank does not update its shard of the weights.",
            leave_a_ranks_weights_as_they_are,
            TWO,
        ),
        Foreign(
            "TTrace (2506.09280): recomputation",
            "A layer that runs again for its backward pass reads another input.",
            recompute_from_another_input,
            (*TWO, "engine.recompute=full"),
        ),
        Foreign(
            "TTrace (2506.09280): router",
            "Routers are kept up by each rank's own counts, and the ranks' routers part.",
            settle_routers_by_a_ranks_own_counts,
            (*TWO, "model=kimi_linear_tiny"),
        ),
        Foreign(
            "allenai/OLMo-core#319, pytorch/torchtitan#166",
            "Ranks draw their first weights from different seeds.",
            draw_other_weights_on_each_rank,
            REPLICAS,
        ),
    )
}

FOUR = ("cluster.workers=4", "parallel.data=2", "parallel.sequence=2")
RIGHT: dict[str, tuple[str, ...]] = {
    "data 2": ("cluster.workers=2", "parallel.data=2"),
    "data 2, accumulated": DATA,
    "data 2 x sequence 2": FOUR,
    "data 2 x sequence 2, recomputed, accumulated": (*FOUR, "engine.recompute=full", "scheduler.tokens_per_rank=4096"),
    "sequence 4, relay, ring": (
        "cluster.workers=4",
        "parallel.transport.recurrence=relay",
        "parallel.transport.attention=ring",
    ),
    "sequence 4, usp": ("cluster.workers=4", "parallel.transport.attention=usp"),
    "allscan, ulysses": (*TWO, "parallel.transport.recurrence=allscan", "parallel.transport.attention=ulysses"),
    "auto": (*TWO, "parallel.transport.recurrence=auto"),
    "contiguous": CONTIGUOUS,
    "selective recomputation, tiles": (*TWO, "engine.recompute=selective", "engine.tile=64"),
    "offloads, resharded": (
        *TWO,
        "engine.offload_activations=true",
        "engine.offload_optimizer=true",
        "engine.reshard_after_forward=true",
    ),
    "spans in time": (*TWO, "train.span_tokens=512"),
    "spans in time, recomputed": (*TWO, "train.span_tokens=512", "engine.recompute=full"),
    "tensor 2": ("cluster.workers=2", "parallel.tensor=2"),
    "tensor 2 x sequence 2": ("cluster.workers=4", "parallel.tensor=2", "parallel.sequence=2"),
    "expert 2": ("cluster.workers=2", "parallel.expert=2", "parallel.sequence=1"),
    "expert 2 x sequence 2": ("cluster.workers=4", "parallel.expert=2", "parallel.sequence=2"),
    "replicate 2, accumulated, recomputed": (
        "cluster.workers=2",
        "parallel.replicate=2",
        "parallel.sequence=1",
        "scheduler.tokens_per_rank=4096",
        "engine.recompute=full",
    ),
    "adaptive": (*TWO, "scheduler=adaptive"),
    "Muon": (*TWO, "optimizer=muon"),
    **{
        f"{name}, transfer over widths, data 2 x tensor 2": (
            *("cluster.workers=4", "parallel.data=2", "parallel.tensor=2", f"optimizer={name}"),
            *("optimizer.transfer=width", "optimizer.base_width=64"),
        )
        for name in ("adamw", "muon")
    },
    "each gradient clipped": (*TWO, "train.clip_each=1.0", "train.clip_value=0.1", "train.z_weight=0.001"),
    "kimi_linear_tiny": (*TWO, "model=kimi_linear_tiny"),
    "qwen3_next_tiny": (*TWO, "model=qwen3_next_tiny"),
    "rwkv7_tiny": (*TWO, "model=rwkv7_tiny"),
    "jamba_tiny": (*TWO, "model=jamba_tiny"),
    "griffin_tiny": (*TWO, "model=griffin_tiny"),
    "samba_tiny, ring": (*TWO, "model=samba_tiny", "parallel.transport.attention=ring"),
    "llama_tiny, one rank": ("cluster.workers=1", "model=llama_tiny"),
}


@cache
def prepared(overrides: tuple[str, ...], steps: int) -> tuple[Shrunk, Reference]:
    """The small run of a configuration, and the side of one process."""
    shrunk = shrink(composed(["cluster=none", *overrides]))
    return shrunk, reference(shrunk.config, steps)


def traced(name: str | None, order: dict[str, Any]) -> None:
    """The trace of a rank, broken by a fault."""
    if name is not None:
        FOREIGN[name].breaks()
    world.run(order)


def verdict(name: str | None, overrides: tuple[str, ...], steps: int = STEPS) -> Verdict | str:
    """The verdict on a run that has this fault, or why it does not run."""
    shrunk, held = prepared(overrides, steps)
    workers = shrunk.config.cluster.workers
    with tempfile.TemporaryDirectory() as place:
        order = {"config": shrunk.config, "run_dir": place, "device": "cpu", "steps": steps}
        try:
            run_world(workers, traced, name, order, timeout=500)
        except AssertionError as error:
            return str(error).strip().splitlines()[-1]
        ranks = [torch.load(world.file_of(Path(place), rank), weights_only=False) for rank in range(workers)]
    return compare(held.want, held.limits, ranks)


def rows() -> str:
    """The table of docs/verify.md."""
    lines = [f"| {each.fault} | {each.source} |" for each in FOREIGN.values()]
    return "\n".join(["| fault | source |", "|---|---|", *lines])


def main(arguments: list[str]) -> int:
    """Runs every fault and every right configuration, or those whose name has a word. Returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("word", nargs="?", default="")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", choices=("faults", "right"))
    chosen = parser.parse_args(arguments)
    cases: list[tuple[str, tuple[str, ...], str | None]] = []
    if chosen.only != "right":
        cases += [(name, each.overrides, name) for name, each in FOREIGN.items()]
    if chosen.only != "faults":
        cases += [(name, overrides, None) for name, overrides in RIGHT.items()]
    failed = 0
    for name, overrides, fault in cases:
        if chosen.word not in name:
            continue
        began, found = time.monotonic(), verdict(fault, overrides, chosen.steps)
        first = found if isinstance(found, str) else found.first
        as_it_should_be = (first is None) == (fault is None)
        if isinstance(first, str):
            stops = FOREIGN[fault].stops if fault is not None else ""
            as_it_should_be = bool(stops) and first.startswith(stops)
        failed += not as_it_should_be
        said = "right" if first is None else first if isinstance(first, str) else _shown(first)
        if first is None and not isinstance(found, str):
            said += f"; worst: {_shown(found.worst)}"
        state = "as it should be" if as_it_should_be else "WRONG"
        print(f"{state}  {name}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"{failed} of these are not as they should be")
    return bool(failed)


def _shown(found: Difference) -> str:
    return f"{found.place}, by {found.error:.1e} of its norm, {found.excess:.1e} of what rounding may"


if __name__ == "__main__":
    torch.set_num_threads(1)
    tests.world._context.set_forkserver_preload(
        ["train.build", "train.verify.world", "launch.verify.proof", "tests.mutations"]
    )
    sys.exit(main(sys.argv[1:]))
