"""A Ray that runs already: where it answers, and which machines it has. Nothing is started here."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from launch.cluster.placement import Node
from launch.errors import UserError

DASHBOARD = "http://127.0.0.1:8265"  # Ray's own default
_ANSWER_S = 5.0  # seconds that a Ray may take to answer; a look at it is two of these at most
_OVERRIDES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray's clients obey these before what they are told


@dataclass(frozen=True)
class Machine:
    """A live machine of a cluster. cpus, gpus: what its Ray was started with, whoever uses them now."""

    name: str
    address: str
    cpus: int
    gpus: int

    def slots(self, device: str) -> int:
        """Workers that it can hold: one a GPU, or one a core."""
        return self.gpus if device == "cuda" else self.cpus


def address_of(given: str | None) -> str:
    """The address of the cluster to use: the one given, else what the environment says, else Ray's own default."""
    address = given or next((os.environ[name] for name in _OVERRIDES if os.environ.get(name)), DASHBOARD)
    if address.startswith("ray://"):
        raise UserError(
            f"cluster.address={address}: Ray Client is not used; expected the dashboard's http://HOST:8265, "
            "or auto on one of the cluster's machines"
        )
    return address.rstrip("/")


def is_remote(address: str) -> bool:
    """Says whether runs are handed over as jobs (http://…), not joined from one of the cluster's machines."""
    return address.startswith(("http://", "https://"))


def check_answers(address: str) -> None:
    """Raises UserError, within ten seconds, where no Ray answers at `address`, or one of another version does."""
    if not is_remote(address):
        return
    parts = urlsplit(address)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise UserError(f"cluster.address={address}: not an address; expected http://HOST:8265") from None
    if parts.scheme not in urllib.request.getproxies():
        from train.timeout import within  # the resolution of a name has no limit of its own

        try:
            within(_ANSWER_S, lambda: socket.create_connection((parts.hostname or "", port), _ANSWER_S).close())
        except OSError as error:
            why = "nothing in 5 s" if isinstance(error, TimeoutError) else error.strerror or error
            raise UserError(f"cluster.address={address}: no Ray answers there ({why})") from None
    there = _get(address, "/api/version", _ANSWER_S).get("ray_version")
    if there is None:
        raise UserError(f"cluster.address={address}: what answers there is not Ray's dashboard")
    from importlib.metadata import version

    if there != version("ray"):
        raise UserError(
            f"cluster.address={address}: Ray {there} runs there, {version('ray')} here; they must be the same"
        )


def _get(address: str, path: str, timeout: float) -> dict[str, Any]:
    """A JSON answer of the dashboard. Raises UserError."""
    request = urllib.request.Request(address + path, headers=_credentials())
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            value = json.load(answer)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise UserError(
                f"cluster.address={address}: asks for a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE"
            ) from None
        raise UserError(f"cluster.address={address}: answers {error.code} to {path}: not Ray's dashboard") from None
    except ValueError:
        raise UserError(f"cluster.address={address}: what answers there is not Ray's dashboard") from None
    except OSError as error:
        raise UserError(f"cluster.address={address}: no Ray answers there ({error})") from None
    return value if isinstance(value, dict) else {}


def _credentials() -> dict[str, str]:
    """The header that a Ray with tokens asks for."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return {}
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled

    return get_auth_headers_if_auth_enabled({})


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Ray's clients obey RAY_ADDRESS before the address they are told: without it, while entered."""
    before = {name: os.environ.pop(name) for name in _OVERRIDES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


@lru_cache(maxsize=8)
def nodes(address: str) -> list[Machine]:
    """The live machines of the Ray at `address` (http://HOST:PORT, HOST:PORT or auto). Raises UserError."""
    check_answers(address)
    try:
        from ray.util.state import list_nodes

        with alone() if is_remote(address) else contextlib.nullcontext():
            listed = list_nodes(address=address, timeout=int(_ANSWER_S), limit=10_000)
    except ImportError:
        raise UserError("cluster.kind=ray: Ray is not installed (ray[default,train])") from None
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cluster.address={address}: Ray does not tell its machines ({line[:200]})") from None
    alive = [node for node in listed if node.state == "ALIVE"]
    return [
        Machine(
            name=node.node_name or node.node_ip,
            address=node.node_ip,
            cpus=int(node.resources_total.get("CPU", 0)),
            gpus=int(node.resources_total.get("GPU", 0)),
        )
        for node in alive
    ]


def device(wanted: str, workers: int, address: str) -> str:
    """`cuda` or `cpu` for `auto`: CUDA where the cluster has a GPU for every worker. Raises UserError."""
    if wanted == "cpu":
        return "cpu"
    gpus = sum(machine.gpus for machine in nodes(address))
    if wanted == "cuda" and not gpus:
        raise UserError(f"cluster.device=cuda: no machine of {address} has a GPU; accepts auto or cpu")
    return "cuda" if wanted == "cuda" or gpus >= workers else "cpu"


def room(cluster: Any, device: str) -> list[Node]:
    """The machines of `cluster.address` and the workers that each can hold, for `launch.cluster.placement.place`."""
    alive = nodes(address_of(cluster.address))
    names = [machine.name for machine in alive]
    return [
        Node(
            name=machine.name if names.count(machine.name) == 1 else f"{machine.name} ({number})",
            address=machine.address,
            slots=machine.slots(device),
        )
        for number, machine in enumerate(alive, start=1)
        if machine.slots(device)
    ]
