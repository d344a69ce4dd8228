"""Names and sentences of the product: no class name means two things, docstrings begin with a verb or a noun."""

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("data", "launch", "models", "parallel", "train")


@cache
def trees() -> dict[str, ast.Module]:
    """Every module of the product, parsed by the first test that asks: not by each process that collects tests."""
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
    }


def test_no_two_public_classes_share_a_name():
    homes = defaultdict(list)
    for file, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(f"{file}:{node.lineno}")
    assert len(homes) > 300
    assert not {name: places for name, places in homes.items() if len(places) > 1}


@pytest.mark.parametrize("room", ROOMS)
def test_no_docstring_opens_with_a_question(room):
    """Nor do modules: "The cost of a layer", not "What a layer costs"."""
    opened = re.compile(r"(What|Whether|Of|How|Which|Where)\b")
    found, seen = [], 0
    for file, tree in trees().items():
        if file.startswith(f"{room}/"):
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module):
                    text = ast.get_docstring(node) or ""
                    seen += bool(text)
                    found += [f"{file}: {text.splitlines()[0]}"] if opened.match(text) else []
    assert seen > 200
    assert not found
