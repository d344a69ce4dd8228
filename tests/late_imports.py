"""Modules that a run imports while it is built and trained: processes that tests fork runs from have them before."""

LATE = (
    "concurrent.futures.process",
    "data.corpora.corpus",
    "data.corpora.hub",
    "data.corpora.megatron",
    "data.corpora.records",
    "data.hf_tokenizer",
    "data.loader",
    "data.stores.prepare",
    "data.unknown",
    "omegaconf",
    "torch.distributed.checkpoint._fsspec_filesystem",
    "train.engines.fsdp",
    "train.optim.adamw",
    "train.phases",
    "train.schedules",
)
