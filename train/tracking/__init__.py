"""The record of a run, and the copies of it that people watch.

`metrics.jsonl` is the record: complete, written before anything else, and what resuming, reporting and the progress
display read. Sinks (Weights & Biases, TensorBoard) get the same stream from rank 0, each through a bounded queue and a
thread of its own: whatever happens to them, training neither waits nor ends.

    record.py       metrics.jsonl and log.txt, and the reader that passes over what was trained again
    tracker.py      what the training loop sees; the queues
    wandb.py        the sink that is a W&B run
    tensorboard.py  the sink that is a TensorBoard folder
    panels.py       a record as what both of them chart
    facts.py        what they are told at the start: configuration, code, lineage
    options.py      what conf/tracking/*.yaml builds
"""

from train.tracking.facts import Facts, without_credentials
from train.tracking.options import Tracking, obey_environment
from train.tracking.record import JsonlWriter, RunLog, newest_attempt, records
from train.tracking.tracker import Tracker

__all__ = ["Facts", "JsonlWriter", "RunLog", "Tracker", "Tracking", "newest_attempt", "obey_environment", "records"]
__all__ += ["without_credentials"]
