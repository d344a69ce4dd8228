"""The assembly of a worker: from the resolved configuration to a Trainer, in the order things depend on each other."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from models.axes import declarations
from parallel.mesh import Groups, everyone
from parallel.sequence import TRANSPORTS
from train import checkpoint, optimizer
from train.construct import construct
from train.execute import Executor
from train.loop import Trainer
from train.observe import Phases
from train.precision import dtypes
from train.settings import ParallelSettings, TrainSettings, section
from train.state import State
from train.track import Jsonl, RunLog, Tracker


def build(order: dict[str, Any]) -> Trainer:
    """A Trainer from what the launcher ordered.

    order: `config` (resolved), `run_dir`, `device`, and optionally `resume` (a verified checkpoint to continue, with
    the optimizer's state and the step) or `init_from` (one to take weights from).
    """
    config, run_dir = order["config"], Path(order["run_dir"])
    device = torch.device("cuda", torch.cuda.current_device()) if order["device"] == "cuda" else torch.device("cpu")
    compute, master = dtypes(config["precision"]["compute"], device.type)
    phases = Phases()
    groups = Groups(waiting=lambda: phases("wait"))

    with torch.device("meta"):
        model = construct(config["model"])
    model.compute = compute
    declared = declarations(model)
    construct(config["engine"]).prepare(model, everyone(device), seed=config["seed"], dtype=master)
    adamw = optimizer.build(construct(config["optimizer"]), model, declared)

    state = State()
    if order.get("resume"):
        facts = checkpoint.load(Path(order["resume"]), model, adamw)
        state = State(facts["step"], facts["tokens"], facts["skips"], facts["attempt"] + 1)
    elif order.get("init_from"):
        checkpoint.load(Path(order["init_from"]), model, None)

    parallel = section(ParallelSettings, config["parallel"])
    train = section(TrainSettings, config["train"])
    transport = parallel.transport
    executor = Executor(
        model,
        groups,
        device,
        TRANSPORTS["recurrence"][transport.recurrence](),
        TRANSPORTS["attention"][transport.attention](),
        train.balance_weight,
        phases,
    )
    data, sequence = parallel.sizes(dist.get_world_size())
    first = dist.get_rank() == 0
    return Trainer(
        settings=train,
        seed=config["seed"],
        rate=config["optimizer"]["lr"],
        run_dir=run_dir,
        model=model,
        optimizer=adamw,
        schedule=construct(config["schedule"]),
        batches=construct(config["data"]).open(train.batch_tokens),
        scheduler=construct(config["scheduler"]),
        data=data,
        sequence=sequence,
        executor=executor,
        groups=groups,
        phases=phases,
        state=state,
        say=RunLog(run_dir / "log.txt") if first else lambda line: None,
        tracker=_tracker(config, run_dir, state) if first else None,
    )


def _tracker(config: dict[str, Any], run_dir: Path, state: State) -> Tracker:
    log = Jsonl(run_dir / "metrics.jsonl")
    log.keep_until(state.step)
    wandb = construct(config["tracking"])
    name = config["run"]["name"] or run_dir.name
    wandb.start(run_dir, name, config, None, RunLog(run_dir / "log.txt"))
    return Tracker(log, wandb)


def run(order: dict[str, Any]) -> None:
    """The entry that a launcher calls on every rank, torch.distributed being initialised."""
    trainer = build(order)
    trainer.fit()
