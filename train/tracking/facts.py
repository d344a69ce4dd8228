"""The facts of a run at its start, for the sinks: its folder, configuration, code and parent."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from data import reading
from train import configuration


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A run at its start.

    code: farspan's version and, of a checkout, `commit`, `branch`, `modified`, `remote`. lineage: the run and the
    checkpoint that the weights come from; {} for a run that starts from nothing. parameters: how many the model has, by
    what they are counted for: `total`, `activated` for a token, `embedding`; {} where nobody has counted.
    """

    run_dir: Path
    name: str
    config: dict[str, Any]
    code: dict[str, Any] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, order: dict[str, Any]) -> Facts:
        """Reads the launcher's order: `run_dir`, `config` and, where there are, `code` and `init_from`.

        Without `code`, what config.yaml in the run's folder says. The lineage is found once and kept in lineage.json:
        a resumed run keeps the one it began with, and its parent may be moved or deleted meanwhile.
        """
        run_dir, config = Path(order["run_dir"]), order["config"]
        code = dict(order.get("code") or _section(_config(run_dir), "code"))
        if code.get("remote"):
            code["remote"] = without_credentials(code["remote"])
        name = config.run.name or run_dir.name
        return cls(run_dir=run_dir, name=name, config=config.to_dict(), code=code, lineage=_lineage(run_dir, order))


def without_credentials(url: str) -> str:
    """A repository's address without user, password, token and query: `https://me:secret@host/x` is `https://host/x`."""
    if "://" not in url:  # user@host:path, as ssh has it
        before, at, rest = url.partition("@")
        return rest if at and ":" in before else url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def artifact_name(name: str) -> str:
    """Returns what a run's checkpoints are called in W&B, which takes letters, digits, "-", "_" and ".", 128 at
    most."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{name}-checkpoint")[-128:]


def _lineage(run_dir: Path, order: dict[str, Any]) -> dict[str, Any]:
    file = run_dir / "lineage.json"
    if file.exists():
        try:
            return reading.json_object(file)
        except ValueError:
            return {}
    if not order.get("init_from"):
        return {}
    parent = _parent(Path(order["init_from"]))
    aside = file.with_suffix(".partial")
    aside.write_text(json.dumps(parent, indent=1) + "\n")
    aside.replace(file)
    return parent


def _parent(checkpoint: Path) -> dict[str, Any]:
    """The run that a checkpoint belongs to, as far as its folder tells: a checkpoint may have been moved."""
    folder = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    file = checkpoint / "manifest.json"
    if not file.exists():  # a folder in Hugging Face's format, which knows of no run
        unknown = ("checkpoint", "step", "tokens", "wandb_id", "project", "entity", "artifact")
        return {"run": checkpoint.name, "folder": str(checkpoint), **dict.fromkeys(unknown)}
    manifest = reading.json_object(file)
    config = _config(folder) or _config(checkpoint)
    tracking = _section(config, "tracking")
    name = _section(config, "run").get("name") or folder.name
    wandb_id = folder / "wandb-id"
    return {
        "run": folder.name,
        "folder": str(folder),
        "checkpoint": checkpoint.name,
        "step": manifest.get("step"),
        "tokens": manifest.get("tokens"),
        "wandb_id": reading.text(wandb_id, 1 << 10).strip() if wandb_id.exists() else None,
        "project": tracking.get("project"),
        "entity": tracking.get("entity"),
        "artifact": f"{artifact_name(name)}:{checkpoint.name}",
    }


def _config(folder: Path) -> dict[str, Any]:
    """Returns what config.yaml in a folder says; {} where it cannot be read: it is of interest, and no more."""
    try:
        return configuration.read(folder)
    except ValueError:
        return {}


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    section = config.get(key)
    return section if isinstance(section, dict) else {}
