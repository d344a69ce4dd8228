"""KubeRay: pods that form a Ray, as a RayJob that also trains on it, or as a RayCluster that waits for jobs.

The head's pod takes no worker: it holds Ray's own processes and the run's launcher. What is rendered is checked against
`kuberay.schema.json`, which allows what we write and nothing else.
"""

import json
import re
import shlex
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from launch.cluster.package import JOB_ENVIRONMENT, TRAIN_ENVIRONMENT
from launch.templates import PATH, Machines, as_yaml, at_least, command, commented, matching, own_words
from train.run_config import RunConfig

SCHEMA = Path(__file__).with_suffix(".schema.json")
ResourceKind = Literal["RayJob", "RayCluster"]
RESOURCES = get_args(ResourceKind)
AuthMode = Literal["token", "disabled"]
AUTHS = get_args(AuthMode)
# With others, KubeRay starts more pods or containers, whose shells read the command once more (`_survives`).
SubmissionMode = Literal["HTTPMode", "K8sJobMode"]
MODES = get_args(SubmissionMode)

_LABEL = r"[a-z]([-a-z0-9]*[a-z0-9])?"
_QUANTITY = (r"[1-9]\d*(\.\d+)?([KMGTP]i?)?", "an amount, as 512Gi")
_SUBDOMAIN = (r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", "a name of small letters, digits, - and .")


@dataclass(frozen=True, kw_only=True)
class KubeRay(Machines):
    """resource: RayJob, which trains and ends by itself, or RayCluster, only the machines, for `farspan submit`.

    name: name of the resource. namespace: namespace of the resource; null for kubectl's own. image: a container image
    that holds farspan, and the Ray of ray_version; must be given. claim: a volume claim that all pods can write
    (ReadWriteMany), for the run; must be given. mount: path of the claim in the pods. nodes: pods with workers, each a
    machine to Ray. memory: memory of a pod with workers, as 512Gi. gpu: Kubernetes' name of a GPU. shm: share of that
    memory for /dev/shm, at most, for NCCL's buffers and Ray's object store; null for Kubernetes' 64 MB. head_cpus:
    cores of the pod that leads the others, and holds no worker. head_memory: memory of the pod that leads the others.
    auth: token: KubeRay (1.5.1 or newer) makes a secret, and Ray asks for it; disabled: anyone who reaches the pods can
    run code in them. ray_version: version of the Ray in the image; null for the one installed here. submission_mode:
    the submitter of a RayJob's run to Ray; HTTPMode: KubeRay's operator itself; K8sJobMode: a pod of its own. shutdown:
    true ends a RayJob's pods after its run. ttl: seconds between the end of the run and theirs. retries: new sets of
    pods for a RayJob after a failure, on which the run goes on. service_account: the account that the pods act as; null
    for the namespace's default. pull_secrets: names of the secrets that the image is fetched with. labels: labels of
    the resource, as {kueue.x-k8s.io/queue-name: training}. node_selector: labels that a machine must have to get pods
    with workers. tolerations: taints that a machine may have all the same, as [{key: nvidia.com/gpu, operator: Exists,
    effect: NoSchedule}].
    """

    resource: ResourceKind = "RayJob"
    name: str = "farspan"
    namespace: str | None = None
    image: str | None = None
    claim: str | None = None
    mount: str = "/mnt/farspan"
    nodes: int = 2
    memory: str = "512Gi"
    gpu: str = "nvidia.com/gpu"
    shm: str | None = "64Gi"
    head_cpus: int = 4
    head_memory: str = "16Gi"
    auth: AuthMode = "token"
    ray_version: str | None = None
    submission_mode: SubmissionMode = "HTTPMode"
    shutdown: bool = True
    ttl: int = 3600
    retries: int = 0
    service_account: str | None = None
    pull_secrets: list[str] = field(default_factory=list)
    labels: dict[str, Any] = field(default_factory=dict)
    node_selector: dict[str, Any] = field(default_factory=dict)
    tolerations: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resource not in RESOURCES:
            raise ValueError(f"{PATH}.resource={self.resource}: must be one of {', '.join(RESOURCES)}")
        if self.auth not in AUTHS:
            raise ValueError(f"{PATH}.auth={self.auth}: must be one of {', '.join(AUTHS)}")
        if self.submission_mode not in MODES:
            raise ValueError(f"{PATH}.submission_mode={self.submission_mode}: must be one of {', '.join(MODES)}")
        for key, least in (("nodes", 1), ("head_cpus", 1), ("ttl", 0), ("retries", 0)):
            at_least(key, getattr(self, key), least)
        # KubeRay adds to the name what it calls its parts, and Kubernetes allows those 63 characters.
        if len(matching("name", self.name, _LABEL, "a name of small letters, digits and -")) > 47:
            raise ValueError(f"{PATH}.name={self.name}: has {len(self.name)} characters; KubeRay takes 47")
        for key in ("memory", "head_memory", *(["shm"] if self.shm is not None else [])):
            matching(key, getattr(self, key), *_QUANTITY)
        for key in ("namespace", "claim", "service_account"):
            if getattr(self, key) is not None:
                matching(key, getattr(self, key), *_SUBDOMAIN)
        for i, secret in enumerate(self.pull_secrets):
            matching(f"pull_secrets[{i}]", secret, *_SUBDOMAIN)
        matching("mount", self.mount, r"(/[\w.-]+)+", "an absolute path")
        matching("gpu", self.gpu, r"([\w.-]+/)?[\w.-]+", "a resource, as nvidia.com/gpu")
        if self.image is not None:
            matching("image", self.image, r"[\w./:@-]+", "an image, as registry/name:tag")
        if self.ray_version is not None:
            matching("ray_version", self.ray_version, r"\d+\.\d+\.\d+", "a version, as 2.60.0")

    def names(self) -> list[str]:
        return [f"pod {i}" for i in range(1, self.nodes + 1)]

    def render(self, config: RunConfig, overrides: list[str]) -> str:
        """The YAML for kubectl. Raises ValueError where KubeRay would refuse it, or a shell change it."""
        for key, what in (("image", "one that holds farspan"), ("claim", "a volume claim that all pods can write")):
            if getattr(self, key) is None:
                raise ValueError(f"{PATH}.{key}=null: must name {what}")
        words, run = own_words(overrides, "run.dir"), self._folder(config)
        if self.resource == "RayJob":
            resource = self._job(config, words, run)
            then = [
                f"  kubectl get rayjob {self.name}{self._in_namespace()}     how it stands",
                f"  kubectl delete rayjob {self.name}{self._in_namespace()}  ends it without saving",
            ]
        else:
            resource = self._resource(self._cluster())
            then = self._submission(config, words, run)
        self._check(resource)
        head = [f"A {self.resource} of KubeRay, written by", f"  {command('farspan', 'template', *overrides)}", ""]
        return commented(*head, *then) + as_yaml(resource)

    def _job(self, config: RunConfig, words: list[str], run: str) -> dict[str, Any]:

        start = ["farspan", "train", *self.cluster_words(config, "auto")]
        # A next set of pods, and a job that the operator submits once more, find the run of the one before.
        entry = command(*start, *words, *([] if config.resume else [f"run.dir={run}", "resume=auto"]))
        if self.submission_mode != "HTTPMode" and not _survives(entry):
            raise ValueError(
                f"{PATH}.submission_mode={self.submission_mode}: its shells would change the run's words; "
                "accepts HTTPMode"
            )
        return self._resource(
            {
                "entrypoint": entry,
                "submissionMode": self.submission_mode,
                "shutdownAfterJobFinishes": self.shutdown,
                **({"ttlSecondsAfterFinished": self.ttl} if self.shutdown else {}),
                "backoffLimit": self.retries,
                "runtimeEnvYAML": as_yaml({"env_vars": TRAIN_ENVIRONMENT | JOB_ENVIRONMENT}),
                "rayClusterSpec": self._cluster(),
            }
        )

    def _submission(self, config: RunConfig, words: list[str], run: str) -> list[str]:
        """The commands that go on from a RayCluster, for its comment."""
        words = [*self.cluster_words(config, "http://127.0.0.1:8265"), *words]
        words += [] if config.resume else [f"run.dir={run}"]
        where = self._in_namespace()
        return [
            f"  kubectl port-forward{where} service/{self.name}-head-svc 8265:8265",
            *(
                [
                    "  export RAY_AUTH_MODE=token",
                    f"  export RAY_AUTH_TOKEN=$(kubectl get secret{where} {self.name} "
                    "-o jsonpath='{.data.auth_token}' | base64 -d)",
                ]
                if self.auth == "token"
                else []
            ),
            f"  {command('farspan', 'submit', *words)}",
        ]

    def _folder(self, config: RunConfig) -> str:
        run = config.run
        folder = run.dir or f"{self.mount}/runs/{run.name or self.name}"
        if not f"{folder}/".startswith(f"{self.mount}/"):
            raise ValueError(f"run.dir={folder}: all pods must see it; expected a folder in {self.mount}")
        if not re.fullmatch(r"[\w./-]+", folder):
            raise ValueError(f"run.dir={folder!r}: expected a path of letters, digits, ., _ and -")
        return folder

    def _resource(self, spec: dict[str, Any]) -> dict[str, Any]:
        metadata: dict[str, Any] = {"name": self.name}
        if self.namespace:
            metadata["namespace"] = self.namespace
        if self.labels:
            metadata["labels"] = dict(self.labels)
        return {"apiVersion": "ray.io/v1", "kind": self.resource, "metadata": metadata, "spec": spec}

    def _cluster(self) -> dict[str, Any]:
        from importlib.metadata import version

        cpus = {"num-cpus": str(self.cpus_per_node)}
        return {
            "rayVersion": self.ray_version or version("ray"),
            "authOptions": {"mode": self.auth},
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"},
                "template": self._pod("ray-head", {"cpu": str(self.head_cpus), "memory": self.head_memory}),
            },
            "workerGroupSpecs": [
                {
                    "groupName": "workers",
                    "replicas": self.nodes,
                    "minReplicas": self.nodes,
                    "maxReplicas": self.nodes,
                    "rayStartParams": {**cpus, "num-gpus": str(self.gpus_per_node)},
                    "template": self._pod("ray-worker", self._amounts()),
                }
            ],
        }

    def _amounts(self) -> dict[str, str]:
        gpus = {self.gpu: str(self.gpus_per_node)} if self.gpus_per_node else {}
        return {"cpu": str(self.cpus_per_node), "memory": self.memory, **gpus}

    def _pod(self, name: str, amounts: dict[str, str]) -> dict[str, Any]:
        """A pod's template. What it asks for is also what it may use: a pod that is moved or throttled stops all."""
        worker = name == "ray-worker"
        mounts = [{"name": "runs", "mountPath": self.mount}]
        volumes: list[dict[str, Any]] = [{"name": "runs", "persistentVolumeClaim": {"claimName": self.claim}}]
        if worker and self.shm:
            mounts.append({"name": "shm", "mountPath": "/dev/shm"})
            volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": self.shm}})
        environment = {"RAY_USAGE_STATS_ENABLED": "0"} | ({"RAY_AUTH_MODE": "disabled"} if self.auth != "token" else {})
        container = {
            "name": name,
            "image": self.image,
            "env": [{"name": key, "value": value} for key, value in environment.items()],
            "resources": {"requests": dict(amounts), "limits": dict(amounts)},
            "volumeMounts": mounts,
        }
        spec: dict[str, Any] = {"containers": [container], "volumes": volumes}
        if self.service_account:
            spec["serviceAccountName"] = self.service_account
        if self.pull_secrets:
            spec["imagePullSecrets"] = [{"name": secret} for secret in self.pull_secrets]
        if worker and self.node_selector:
            spec["nodeSelector"] = dict(self.node_selector)
        if worker and self.tolerations:
            spec["tolerations"] = list(self.tolerations)
        return {"spec": spec}

    def _in_namespace(self) -> str:
        return f" -n {self.namespace}" if self.namespace else ""

    @staticmethod
    def _check(resource: dict[str, Any]) -> None:
        """Raises ValueError for what the schema does not allow, on one line with the field."""
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import best_match

        error = best_match(Draft202012Validator(schema()).iter_errors(resource))
        if error is not None:
            field = ".".join(str(part) for part in error.absolute_path) or "the resource"
            raise ValueError(f"{PATH}: {field}: {' '.join(error.message.split())[:200]}")


@cache
def schema() -> dict[str, Any]:
    """Returns what we may write, as a JSON Schema."""
    return json.loads(SCHEMA.read_text(encoding="utf-8"))


def _survives(entry: str) -> bool:
    """Says whether a command comes through `ray job submit`, which joins its words by Windows' rules for another
    shell."""
    words = shlex.split(entry)
    joined = subprocess.list2cmdline(words)
    try:
        return shlex.split(joined) == words and not any(sign in joined for sign in "$`\\;&|<>()*?#~!\n")
    except ValueError:
        return False
