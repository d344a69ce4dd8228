"""`ray up`: machines that are reached by ssh, one's own or of AWS, as a Ray that waits for jobs.

The machine that leads works as well: one rented by the hour should. What is rendered goes through Ray's own schema and
checks, those of the Ray that is installed here.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from launch.cluster.placement import natural
from launch.templates import LINE, PATH, Machines, as_yaml, at_least, command, commented, matching, on_lines, own_words
from train.run_config import RunConfig

ProviderName = Literal["local", "aws"]
PROVIDERS = get_args(ProviderName)
_HOST = (r"[\w.:-]+", "an address or a name of a machine")
_TOKEN = "~/.ray/auth_token"  # Ray's own place for it, on every machine


@dataclass(frozen=True, kw_only=True)
class RayUp(Machines):
    """provider: local (machines that run already: head_ip, worker_ips) or aws (`nodes` machines of type `instance`).

    name: name of the machines together, by which `ray up` finds them again. head_ip: local only: address of the machine
    that leads; must be given. worker_ips: local only: addresses of the others. nodes: aws only: all machines, the one
    that leads among them. instance: aws only: type of the machines. region: aws only: their region. zone: aws only:
    their zones in the region, separated by commas; null for Ray's choice. ami: aws only: their image; null for Ray's
    choice. disk: aws only: GB of each machine's disk. spot: aws only: take all but the one that leads at the spot
    price; they may be taken back at any time. ssh_user: the user that ssh logs in as. ssh_private_key: the file of
    ssh's key; null for ssh's own choice (local), or for a key that Ray makes (aws). setup: shell lines, once on every
    machine: install farspan, mount the file system for runs. activate: a shell line before Ray starts: source
    venv/bin/activate. port: port of Ray, between the machines.
    """

    provider: ProviderName = "local"
    name: str = "farspan"
    head_ip: str | None = None
    worker_ips: list[str] = field(default_factory=list)
    nodes: int = 2
    instance: str = "p5.48xlarge"
    region: str = "us-east-1"
    zone: str | None = None
    ami: str | None = None
    disk: int = 500
    spot: bool = False
    ssh_user: str = "ubuntu"
    ssh_private_key: str | None = None
    setup: list[str] | None = None
    activate: str | None = None
    port: int = 6379

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.provider not in PROVIDERS:
            raise ValueError(f"{PATH}.provider={self.provider}: must be one of {', '.join(PROVIDERS)}")
        at_least("nodes", self.nodes, 1)
        at_least("disk", self.disk, 20)
        if not 1024 <= self.port <= 65_535:
            raise ValueError(f"{PATH}.port={self.port}: expected a port between 1024 and 65535")
        if self.provider == "local" and self.head_ip is None:
            raise ValueError(f"{PATH}.head_ip=null: must name the machine that leads")
        hosts = [("head_ip", self.head_ip)] if self.head_ip is not None else []
        hosts += [(f"worker_ips[{i}]", host) for i, host in enumerate(self.worker_ips)]
        for i, (key, host) in enumerate(hosts):
            matching(key, host, *_HOST)
            if host in [other for _, other in hosts[:i]]:
                raise ValueError(f"{PATH}.{key}={host}: is named twice")
        for key, pattern, accepts in (
            ("name", r"[a-z]([-a-z0-9]*[a-z0-9])?", "a name of small letters, digits and -"),
            ("instance", r"[a-z0-9-]+\.[a-z0-9-]+", "a type of machine, as p5.48xlarge"),
            ("region", r"[a-z]+(-[a-z]+)+-\d", "a region, as us-east-1"),
            ("zone", r"[a-z]+(-[a-z]+)+-\d[a-z](,[a-z]+(-[a-z]+)+-\d[a-z])*", "zones, as us-east-1a,us-east-1b"),
            ("ami", r"ami-[0-9a-f]+", "an image, as ami-0123456789abcdef0"),
            ("ssh_user", r"[\w.-]+", "a user's name"),
            ("ssh_private_key", LINE, "a path"),
            ("activate", LINE, "one line of shell"),
        ):
            if getattr(self, key) is not None:
                matching(key, getattr(self, key), pattern, accepts)
        on_lines("setup", self.setup)

    def names(self) -> list[str]:
        if self.provider == "local":
            return sorted([self.head_ip or "", *self.worker_ips], key=natural)
        return [f"machine {i}" for i in range(1, self.nodes + 1)]

    def render(self, config: RunConfig, overrides: list[str]) -> str:
        """The YAML for `ray up`. Raises ValueError where Ray would refuse it."""
        cluster = self._cluster()
        _check(cluster)
        words = [*self.cluster_words(config, "http://127.0.0.1:8265"), *own_words(overrides)]
        head = [
            "Machines for farspan, written by",
            f"  {command('farspan', 'template', *overrides)}",
            "",
            "  export RAY_AUTH_MODE=token",
            "  ray get-auth-token --generate > /dev/null    once; the machines get a copy",
            "  ray up FILE",
            "  ray dashboard FILE                           in another terminal: brings port 8265 here",
            f"  {command('farspan', 'submit', *words)}",
            "  ray down FILE",
        ]
        if not config.resume and not config.run.dir:
            head.insert(-1, "      with run.dir=FOLDER on a file system that all machines share")
        return commented(*head) + as_yaml(cluster)

    def _cluster(self) -> dict[str, Any]:
        auth = {"ssh_user": self.ssh_user}
        if self.ssh_private_key:
            auth["ssh_private_key"] = self.ssh_private_key
        # Without a secret, anyone who reaches the machines could run code on them as this user.
        first = f"{self.activate} && " if self.activate else ""
        join = f"{first}export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 && {{ ulimit -n 65536 || true; }} && "
        join += f"ray start --num-cpus={self.cpus_per_node} --num-gpus={self.gpus_per_node} "
        join += "--object-store-memory=100000000"  # near its least: nothing of ours goes through it
        ports = "--object-manager-port=8076 --node-manager-port=8077"
        return {
            "cluster_name": self.name,
            "provider": self._provider(),
            "auth": auth,
            **self._machines(),
            "file_mounts": {_TOKEN: _TOKEN},
            "setup_commands": list(self.setup or []),
            "head_setup_commands": [f"{first}pip install boto3"] if self.provider == "aws" else [],  # to start others
            "worker_setup_commands": [],
            "head_start_ray_commands": [
                f"{first}ray stop",
                f"{join} --head --port={self.port} {ports} --dashboard-port=8265 --ray-client-server-port=10001 "
                "--autoscaling-config=~/ray_bootstrap_config.yaml",
            ],
            "worker_start_ray_commands": [f"{first}ray stop", f"{join} --address=$RAY_HEAD_IP:{self.port} {ports}"],
        }

    def _provider(self) -> dict[str, Any]:
        if self.provider == "local":
            return {"type": "local", "head_ip": self.head_ip, "worker_ips": list(self.worker_ips)}
        zone = {"availability_zone": self.zone} if self.zone else {}
        # Stopped machines would go on costing their disks.
        return {"type": "aws", "region": self.region, **zone, "cache_stopped_nodes": False}

    def _machines(self) -> dict[str, Any]:
        """The count of machines, all from the first minute: a run waits for all of its workers."""
        if self.provider == "local":
            return {"max_workers": len(self.worker_ips)}
        others = self.nodes - 1
        resources = {"CPU": self.cpus_per_node} | ({"GPU": self.gpus_per_node} if self.gpus_per_node else {})
        node: dict[str, Any] = {"InstanceType": self.instance}
        if self.ami:
            node["ImageId"] = self.ami
        node["BlockDeviceMappings"] = [
            {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": self.disk, "VolumeType": "gp3"}}
        ]
        market = {"InstanceMarketOptions": {"MarketType": "spot"}} if self.spot else {}
        types = {"head": {"resources": resources, "min_workers": 0, "max_workers": 0, "node_config": node}}
        if others:
            count = {"min_workers": others, "max_workers": others}
            types["worker"] = {"resources": dict(resources), **count, "node_config": {**node, **market}}
        return {"max_workers": others, "head_node_type": "head", "available_node_types": types}


def _check(cluster: dict[str, Any]) -> None:
    """Raises ValueError, on one line with the field, for what Ray would refuse."""
    try:
        import jsonschema
        import ray.autoscaler
        from ray.autoscaler._private.util import prepare_config, validate_config
    except ImportError as error:
        raise ValueError(f"{PATH}: a file for `ray up` is checked by Ray, which is not installed ({error})") from None
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
    mismatch = jsonschema.exceptions.best_match(jsonschema.Draft7Validator(schema).iter_errors(cluster))
    if mismatch is not None:
        where = ".".join(str(part) for part in mismatch.absolute_path) or "the file"
        raise ValueError(f"{PATH}: {where}: {' '.join(mismatch.message.split())[:200]}")
    try:
        validate_config(prepare_config(json.loads(json.dumps(cluster))))  # a copy: Ray fills in what is missing
    except Exception as refused:  # Ray's checks raise what they like, click's among it
        raise ValueError(f"{PATH}: Ray refuses: {' '.join(str(refused).split())[:200]}") from None
