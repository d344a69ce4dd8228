"""Completion by the shell: `farspan completion SHELL` prints what the shell reads, and that asks `farspan complete`.

A question is the words of the line up to the cursor; the answer one candidate a line, each a whole word. It comes
within a tenth of a second or so: conf/ is read as plain YAML, accepted values from the constructors' source, and
neither Hydra nor torch is imported.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from launch.config import files
from launch.config.choices import GIVEN, accepts, nested, parameters
from launch.errors import UserError
from launch.verbs import VERBS, Verb

RUN_KEYS = ("resume", "init_from")
PATH_KEYS = ("data.path", "data.store", "data.local", "data.tokenizer", "run.dir", "prompt_file")

SCRIPTS = {
    "bash": r"""
_farspan() {
  local line="${COMP_LINE:0:COMP_POINT}" kept="" words current candidate i
  # Blanks part words; bash itself also cuts them at = : @ (COMP_WORDBREAKS), and replaces what follows the last cut.
  read -a words <<< "$1${line#*"$1"}"
  [[ $line == *[[:blank:]] && $line != *\\[[:blank:]] ]] && words+=("")
  current="${words[${#words[@]}-1]}"
  for ((i = 0; i < ${#current}; i++)); do
    [[ "=:@" == *"${current:i:1}"* && $COMP_WORDBREAKS == *"${current:i:1}"* ]] && kept="${current:0:i+1}"
  done
  COMPREPLY=()
  while IFS= read -r candidate; do
    [[ $candidate == *[=/.] ]] && compopt -o nospace 2> /dev/null
    candidate="${candidate#"$kept"}"
    [[ $candidate == *[[:space:]\'\"\$\&\;\(\)]* ]] && printf -v candidate %q "$candidate"
    COMPREPLY+=("$candidate")
  done < <("${words[0]/#\~/$HOME}" complete -- "${words[@]:1}" 2> /dev/null)
}
complete -F _farspan farspan
""",
    "zsh": r"""
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
_farspan() {
  local -a found open closed
  found=("${(@f)$("${words[1]}" complete -- "${(@)words[2,CURRENT-1]}" "$PREFIX" 2> /dev/null)}")
  found=("${(@)found:#}")
  open=("${(@M)found:#*[=\/.]}")
  closed=("${(@)found:#*[=\/.]}")
  (( $#open )) && compadd -Q -S '' -- "${(@)open}"
  (( $#closed )) && compadd -Q -- "${(@)closed}"
}
compdef _farspan farspan
""",
    "fish": r"""
function __farspan_complete
    set -l words (commandline -opc)
    set -l current (commandline -ct)
    set -l program $words[1]
    set -e words[1]
    $program complete -- $words "$current" 2>/dev/null
end
complete -c farspan -f -a '(__farspan_complete)'
""",
}


def completion(arguments: list[str]) -> int:
    """Prints a shell's script. Raises UserError."""
    if len(arguments) != 1 or arguments[0] not in SCRIPTS:
        raise UserError(f"{' '.join(arguments) or 'SHELL: missing'}: accepts {', '.join(SCRIPTS)}")
    print(SCRIPTS[arguments[0]].lstrip("\n"), end="")
    return 0


def complete(words: list[str]) -> int:
    """Prints the candidates for the last of the words."""
    try:
        lines = candidates(words[1:] if words[:1] == ["--"] else words)
    except Exception:  # a line that is half typed may be anything, and nothing may be written into it
        lines = []
    print("".join(f"{candidate}\n" for candidate in sorted(set(lines))), end="")
    return 0


def candidates(words: list[str]) -> list[str]:
    """Returns what the last word can become; the others are those before it, the verb first."""
    *before, word = words or [""]
    if not before:
        return _starting(word, VERBS)
    verb, arguments = VERBS[before[0]], before[1:]
    if word.startswith("-"):
        return _starting(word, [*re.findall(r"--\w+", verb.synopsis), *["--cfg"] * verb.overrides, "--help"])
    if verb.overrides or arguments and "[key=value" in verb.synopsis:  # behind a RUN
        runs = _runs(word) if verb.synopsis.startswith("[RUN]") and not arguments and "=" not in word else []
        return [*runs, *_override(word, verb, arguments)]
    if verb.synopsis == "SHELL":
        return _starting(word, SCRIPTS)
    key, equals, value = word.partition("=")
    if equals:
        return [f"{key}={path}" for path in _paths(value)] if key in PATH_KEYS else []
    keys = [f"{key}=" for key in re.findall(r"\[([\w.]+)=", verb.synopsis)]
    if verb.synopsis.startswith(("RUN", "JOB")) and not arguments:
        return _runs(word)
    return _starting(word, keys)


def values(key: str, tree: dict[str, Any]) -> list[str]:
    """The values that a key accepts, where they are a closed set."""
    parent, _, name = key.rpartition(".")
    target = _classes(tree).get(parent, "")
    if parameters(target).get(name) == "bool" or files.leaves(tree).get(key) in ("true", "false"):
        return ["true", "false"]
    return accepts(target, name)


def _override(word: str, verb: Verb, before: list[str]) -> list[str]:
    """`group=option` and `section.key=value`, under the options that were chosen before."""
    bare = word.lstrip("+~")
    sign = word.removesuffix(bare)
    given = [other.lstrip("+") for other in before if "=" in other]
    tree, placed = files.written(dict(other.split("=", 1) for other in verb.arguments(given)))
    key, equals, value = bare.partition("=")
    if not equals:
        keys = [f"{sign}{full}" for full in _starting(bare, _keys(bare, tree, placed))]
        return [full.rstrip("=") for full in keys] if sign == "~" else keys
    several, comma, last = value.rpartition(",") if verb is VERBS["sweep"] else ("", "", value)
    group = key.partition("@")[0]
    if key in placed and group in files.groups():
        keys = _starting(last, files.groups()[group])
    elif key in RUN_KEYS:
        keys = _runs(last)
    elif key in PATH_KEYS:
        keys = _paths(last)
    else:
        keys = _starting(last, values(key, tree))
    return [f"{sign}{key}={several}{comma}{accepted}" for accepted in keys]


def _keys(word: str, tree: dict[str, Any], placed: Iterable[str]) -> list[str]:
    """Groups, sections and top-level keys; once a section is named, its keys in full."""
    if "." not in word or "@" in word:
        sections = [f"{key}." if isinstance(node, dict) else f"{key}=" for key, node in tree.items()]
        return [*(f"{group}=" for group in placed), *sections]
    known = [f"{parent}.{name}" for parent, target in _classes(tree).items() for name in parameters(target)]
    given = [key for key in known if key.rpartition(".")[2] in GIVEN and key not in files.leaves(tree)]
    inner = {key for key in known if any(other.startswith(f"{key}.") for other in known)}
    full = [key for key in files.leaves(tree) if not key.rpartition(".")[2].startswith("_")]
    return [f"{key}=" for key in {*full, *known} - {*given, *inner}]


def _classes(node: Any, path: str = "", above: str = "") -> dict[str, str]:
    """The class that each section and each object is checked against, by its full key."""
    if not isinstance(node, dict):
        return {}
    name = path.rpartition(".")[2]
    own = node.get("_target_") or (nested(above, name) if above else f"train.settings.{name.title()}Settings") or ""
    classes = {path: own} if parameters(own) else {}
    for key, child in node.items():
        classes |= _classes(child, f"{path}.{key}" if path else key, own if path else "")
    return classes


def _runs(start: str) -> list[str]:
    """Run folders, here or under the path that was begun; a name alone stands for one in runs/."""
    here = [str(config.parent) for config in Path("runs").glob("*/config.yaml")]
    if not start:
        return here
    names = [Path(run).name for run in here]
    inside = [path for path in _paths(start) if path.endswith("/")]
    runs = {path[:-1] if Path(path, "config.yaml").exists() else path for path in inside}
    return sorted({*_starting(start, [*here, *names]), *runs})


def _paths(start: str) -> list[str]:
    """Files and folders, the latter with a slash behind them."""
    folder, _, name = start.rpartition("/")
    head = f"{folder}/" if "/" in start else ""
    shown = [path for path in Path(head or ".").iterdir() if not path.name.startswith(".") or name.startswith(".")]
    return _starting(start, [f"{head}{path.name}{'/' if path.is_dir() else ''}" for path in shown])


def _starting(start: str, known: Iterable[str]) -> list[str]:
    return [each for each in known if each.startswith(start)]
