"""What import-linter cannot say: `models/` and schedulers never touch torch.distributed; no imports run in a circle."""

import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("data", "launch", "models", "parallel", "train")
FILES = [*ROOT.glob("models/**/*.py"), *ROOT.glob("parallel/schedule/*.py")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_torch_distributed(path):
    assert not re.search(r"torch\.distributed|from torch import .*\bdistributed\b", _code(path)), path


def _code(path: Path) -> str:
    return re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL)


def test_no_imports_run_in_a_circle():
    graph = grimp.build_graph(*ROOMS, cache_dir=None)  # those in functions and under TYPE_CHECKING too
    assert len(graph.modules) > 300
    assert circle({module: graph.find_modules_directly_imported_by(module) for module in graph.modules}) is None


@pytest.mark.parametrize("how", ["import {}", "def f():\n    import {}", "if TYPE_CHECKING:\n    import {}"])
def test_a_circle_is_found_wherever_its_imports_stand(tmp_path, monkeypatch, how):
    room = tmp_path / "roomy"
    room.mkdir()
    (room / "__init__.py").touch()
    for name, other in (("a", "b"), ("b", "c"), ("c", "a")):
        begin = "from typing import TYPE_CHECKING\n" if "TYPE" in how else ""
        (room / f"{name}.py").write_text(begin + how.format(f"roomy.{other}") + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    graph = grimp.build_graph("roomy", cache_dir=None)
    found = circle({module: graph.find_modules_directly_imported_by(module) for module in graph.modules})
    assert found is not None and set(found) == {"roomy.a", "roomy.b", "roomy.c"}


def circle(arrows: dict[str, set[str]]) -> list[str] | None:
    """Modules of which each imports, or is imported by, the next; None where there is no circle."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return error.args[1]
    return None
