"""A Slurm job: it starts a Ray on its machines, hands the run over to that, and follows it.

The text is three parts: `#SBATCH` lines; the settings, as shell variables; and `slurm.sh`, which is the same in every
job and says why it does what it does.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.templates import PATH, Machines, at_least, command, commented, matching, on_lines, own_words
from train.run_config import RunConfig
from train.settings import RunSettings

BODY = Path(__file__).with_suffix(".sh")

_NAME = (r"[\w.@:+-]+", "a name")
_NAMES = (r"[\w.@:+-]+(,[\w.@:+-]+)*", "names, separated by commas")
_HOSTS = (r"[\w.,\[\]-]+", "machines, as node[1-4,7]")
_MINUTES = r"\d+|\d+:\d{1,2}|\d+:\d{1,2}:\d{1,2}|\d+-\d{1,2}(:\d{1,2}){0,2}"
_TIME = (f"{_MINUTES}|UNLIMITED|INFINITE", "MINUTES, HOURS:MINUTES:SECONDS or DAYS-HOURS[:MINUTES[:SECONDS]]")
_SIZE = (r"\d+[KMGT]?", "a whole number with K, M, G or T")
_COUNT = (r"\d+", "a whole number")
_MAIL = "NONE|BEGIN|END|FAIL|REQUEUE|ALL|INVALID_DEPEND|STAGE_OUT|TIME_LIMIT(_90|_80|_50)?|ARRAY_TASKS"
_AFTER = r"(after|afterok|afternotok|afterany|aftercorr|afterburstbuffer):\d+(\+\d+)?(:\d+(\+\d+)?)*|singleton"

# sbatch's long options that a job may set, with the forms of their values, as sbatch(1) has them.
OPTIONS: dict[str, tuple[str, str]] = {
    "account": _NAME,
    "begin": (r"[\w:+/-]+", "a time, as 16:00, now+2hours or 2027-01-20T12:34:00"),
    "clusters": _NAMES,
    "comment": (r"[^\s'\"#\\]+", "text without blanks and quotes"),
    "constraint": (r"[\w.&|*,:()\[\]+-]+", "features, as h100&ib"),
    "core-spec": _COUNT,
    "cpus-per-task": _COUNT,
    "deadline": (r"[\w:+/-]+", "a time, as 2027-01-20T12:34:00"),
    "dependency": (rf"({_AFTER})([,?]({_AFTER}))*", "as afterok:JOB"),
    "exclude": _HOSTS,
    "gres": (r"[\w.-]+(:[\w.-]+){0,2}(,[\w.-]+(:[\w.-]+){0,2})*", "as gpu:8 or gpu:h100:8"),
    "job-name": _NAME,
    "licenses": (r"[\w.@:+,|-]+", "licences, as NAME:COUNT"),
    "mail-type": (rf"({_MAIL})(,({_MAIL}))*", "events, as END,FAIL"),
    "mail-user": (r"[\w.@+-]+", "an address"),
    "mem": _SIZE,
    "nice": (r"-?\d+", "a whole number"),
    "nodelist": _HOSTS,
    "nodes": _COUNT,
    "ntasks-per-node": _COUNT,
    "open-mode": (r"append|truncate", "append or truncate"),
    "output": (r"[^\s'\"#]+", "a path without blanks"),
    "partition": _NAMES,
    "priority": (r"\d+|TOP", "a whole number"),
    "qos": _NAME,
    "reservation": _NAMES,
    "signal": (r"([RB]+:)?(\d+|[A-Z0-9]+)(@\d+)?", "as B:USR1@300"),
    "switches": (rf"\d+(@({_MINUTES}))?", "COUNT or COUNT@TIME"),
    "time": _TIME,
    "time-min": _TIME,
    "tmp": _SIZE,
    "wckey": _NAME,
}
# Options that have a key of their own, or that the script depends on.
TAKEN = {
    "account": "account",
    "cpus-per-task": "cpus_per_node",
    "exclusive": "exclusive",
    "gres": "gpus_per_node",
    "gpus": "gpus_per_node",
    "gpus-per-node": "gpus_per_node",
    "job-name": "name",
    "mem": "memory",
    "nodes": "nodes",
    "output": "output",
    "partition": "partition",
    "qos": "qos",
    "requeue": "requeues",
    "signal": "grace",
    "time": "time",
}
_FIXED = ("ntasks-per-node", "open-mode")


@dataclass(frozen=True, kw_only=True)
class Slurm(Machines):
    """nodes: machines of the job. gpu: type of the GPUs, where the cluster has several; null for any.

    memory: memory of a machine, as 512G, a bare number in MB; null for all of it or, on shared machines, for Slurm's
    default. time: the job's limit: minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS; null for the partition's. partition:
    partition in which the job queues; null for Slurm's default. account: account that pays for the job; null for the
    user's own. qos: the job's quality of service; null for Slurm's default. name: name of the job. output: file of the
    job's output, in sbatch's pattern: %x is the job's name, %j its number. grace: seconds before the limit at which
    Slurm asks the run to save. requeues: times that the job may queue again at its limit, and go on; 0 for never.
    exclusive: no other job on the machines; without it, ports follow the job's number, so that two jobs can meet on
    one. join: seconds that the machines may take to form a cluster. interface: interface of the network between the
    machines, as ib0; null for the one that their names lead to. port: port of Ray, on the first machine.
    dashboard_port: port of Ray's dashboard, there too. setup: shell lines that put farspan on the PATH of every
    machine: [module load python, source venv/bin/activate]. directives: further options of sbatch by their long names:
    {constraint: h100, mail-type: END}.
    """

    nodes: int = 2
    gpu: str | None = None
    memory: str | int | None = None
    time: str | int | None = "24:00:00"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    name: str = "farspan"
    output: str = "%x-%j.out"
    exclusive: bool = True
    requeues: int = 20
    grace: int = 300
    join: int = 600
    interface: str | None = None
    port: int = 6379
    dashboard_port: int = 8265
    setup: list[str] | None = None
    directives: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, least in (("nodes", 1), ("requeues", 0), ("grace", 30), ("join", 1)):
            at_least(key, getattr(self, key), least)
        for key in ("port", "dashboard_port"):
            if not 1024 <= getattr(self, key) <= 64_000:
                raise ValueError(f"{PATH}.{key}={getattr(self, key)}: expected a port between 1024 and 64000")
        if self.port == self.dashboard_port:
            raise ValueError(f"{PATH}.dashboard_port={self.dashboard_port}: is {PATH}.port already")
        if self.interface is not None:
            matching("interface", self.interface, r"[\w.-]{1,15}", "the name of a network interface")
        if self.gpu is not None:
            matching("gpu", self.gpu, r"[\w.-]+", "a type of GPU, as h100")
        on_lines("setup", self.setup)
        if not isinstance(self.directives, dict):
            raise ValueError(f"{PATH}.directives={self.directives}: expected options with values, as {{nice: 100}}")
        self._sbatch()

    def names(self) -> list[str]:
        return [f"node {i}" for i in range(1, self.nodes + 1)]

    def render(self, config: RunConfig, overrides: list[str]) -> str:
        """The script for sbatch."""
        kind, *settled_words = self.cluster_words(config, None)
        settled = f'{kind} "cluster.address=$url" {command(*settled_words)}'
        words = [command(word) for word in own_words(overrides, "run.dir")]
        resumed = config.resume  # then the run is named among the words, on every turn of the job
        begin = " ".join([settled, *words, *([] if resumed else ['"run.dir=$quoted"'])])
        again = begin if resumed else f'{settled} "resume=$quoted"'
        settings = {
            "nodes": self.nodes,
            "cpus": self.cpus_per_node,
            "gpus": self.gpus_per_node,
            "gres": self._gres() or "''",
            "port": self.port,
            "dashboard_port": self.dashboard_port,
            "shared": "''" if self.exclusive else "yes",
            "interface": self.interface or "''",
            "join": self.join,
            "requeues": self.requeues,
            "run": _folder(config.run, resumed),
        }
        original = command("farspan", "template", *overrides)
        head = [
            "#!/usr/bin/env bash",
            *self._sbatch(),
            "#",
            commented(
                "A run of farspan on machines of Slurm, written by",
                f"  {original}",
                "",
                "  sbatch FILE                            starts it",
                "  scancel --batch --signal=TERM JOB      saves and ends it; a plain scancel ends it without saving",
            ),
            "set -euo pipefail",
            *(f"{name}={value}" for name, value in settings.items()),
            f"begin() {{ exec farspan train {begin}; }}",
            f"again() {{ exec farspan train {again}; }}",
            "",
        ]
        if self.setup:  # environment modules and conda are not written for -e and -u
            head += ["set +eu", *self.setup, "set -eu", ""]
        return "\n".join(head) + BODY.read_text(encoding="utf-8")

    def _gres(self) -> str | None:
        if not self.gpus_per_node:
            return None
        return f"gpu:{self.gpu}:{self.gpus_per_node}" if self.gpu else f"gpu:{self.gpus_per_node}"

    def _sbatch(self) -> list[str]:
        """The `#SBATCH` lines. Raises ValueError for an option or a value that Slurm would refuse."""
        own: dict[str, Any] = {
            "job-name": self.name,
            "nodes": self.nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": self.cpus_per_node,
            "gres": self._gres(),
            "mem": 0 if self.memory is None and self.exclusive else self.memory,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "output": self.output,
            "open-mode": "append",
            "signal": f"B:USR1@{self.grace}",
        }
        lines = []
        for option, value in own.items():
            if value is not None:
                pattern, accepts = OPTIONS[option]
                lines.append(f"#SBATCH --{option}={matching(TAKEN.get(option, option), value, pattern, accepts)}")
        if self.exclusive:
            lines.append("#SBATCH --exclusive")
        lines.append("#SBATCH --requeue" if self.requeues else "#SBATCH --no-requeue")
        for option, value in self.directives.items():
            if option in TAKEN:
                raise ValueError(f"{PATH}.directives.{option}={value}: is set by {PATH}.{TAKEN[option]}")
            if option not in OPTIONS or option in _FIXED:
                known = ", ".join(name for name in OPTIONS if name not in TAKEN and name not in _FIXED)
                raise ValueError(f"{PATH}.directives.{option}={value}: no such option here; accepts {known}")
            pattern, accepts = OPTIONS[option]
            lines.append(f"#SBATCH --{option}={matching(f'directives.{option}', value, pattern, accepts)}")
        return lines


def _folder(run: RunSettings, resumed: str | None) -> str:
    """The run's folder as a word of the script, which makes it absolute."""
    if resumed:
        return command(resumed)
    if run.dir:
        return command(run.dir)
    return command(f"runs/{run.name}") if run.name else '"runs/$SLURM_JOB_NAME-$SLURM_JOB_ID"'
