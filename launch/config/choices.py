"""The keys that a class takes, and the values that it accepts for one: its signature, read without importing it.

Closed sets of values are `Literal` hints. The shell's completion has a tenth of a second, and an import of torch takes
one.
"""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GIVEN = ("dim", "slot", "depth", "params")  # what the program itself gives to a `_partial_` node when it builds it


def accepts(target: str, key: str) -> list[str]:
    """The values that a class ("train.engines.FSDP") takes for a key; [] where they are open."""
    module, hint = _hints(target).get(key, ("", None))
    return [] if hint is None else _closed(module, hint)


def _closed(module: str, hint: ast.AST) -> list[str]:
    """The texts of the `Literal` in a type hint, or in the one that it names, which may be imported."""
    if isinstance(hint, ast.BinOp):  # one type or another
        return _closed(module, hint.left) + _closed(module, hint.right)
    if isinstance(hint, ast.Name):
        where, value = _constant(module, hint.id)
        return _closed(where, value) if isinstance(value, ast.Subscript) else []
    if isinstance(hint, ast.Subscript) and _name(hint.value) == "Literal":
        elements = hint.slice.elts if isinstance(hint.slice, ast.Tuple) else [hint.slice]
        return [each.value for each in elements if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    return []


def parameters(target: str) -> dict[str, str]:
    """The keys that a class of ours takes, each with the annotation of its type; {} for another's class."""
    return {key: ast.unparse(hint) if hint else "" for key, (_, hint) in _hints(target).items()}


def _hints(target: str) -> dict[str, tuple[str, ast.AST | None]]:
    """Each key's module and type hint, those that a base declares included."""
    module, owner = _class(target)
    if owner is None:
        return {}
    for node in owner.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return {a.arg: (module, a.annotation) for a in [*node.args.args[1:], *node.args.kwonlyargs]}
    hints = {k: v for base in owner.bases for k, v in _hints(f"{module}.{_name(base)}").items()}
    fields = [node for node in owner.body if isinstance(node, ast.AnnAssign)]
    return hints | {str(_name(node.target)): (module, node.annotation) for node in fields}


def nested(target: str, key: str) -> str | None:
    """The class of a key's own keys: what a field of a dataclass is annotated with, in the same module."""
    inner = f"{target.rpartition('.')[0]}.{parameters(target).get(key, '')}"
    return inner if _class(inner)[1] else None


def _class(target: str) -> tuple[str, ast.ClassDef | None]:
    """The module that defines a class, and the class; what a package hands on is followed to where it is from."""
    module, _, name = target.rpartition(".")
    for node in _module(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _class(f"{node.module}.{alias.name}")
        if isinstance(node, ast.Assign) and _name(node.targets[0]) == "HOMES" and isinstance(node.value, ast.Dict):
            homes = ast.literal_eval(node.value)
            if name in homes:
                return _class(f"{homes[name]}.{name}")
    return module, None


def _constant(module: str, name: str) -> tuple[str, ast.AST | None]:
    """The value of a module's constant, or of one that it imports, and the module that has it."""
    for node in _module(module).body:
        if isinstance(node, ast.Assign) and any(_name(target) == name for target in node.targets):
            return module, node.value
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _constant(node.module, alias.name)
    return module, None


def _name(node: ast.AST) -> str | None:
    """`x` of x, of self.x and of anything.x."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


@cache
def _module(name: str) -> ast.Module:
    """The syntax tree of one of farspan's modules; an empty one for any other."""
    path = ROOT.joinpath(*name.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return ast.parse(file.read_text(encoding="utf-8"))
    return ast.Module(body=[], type_ignores=[])
