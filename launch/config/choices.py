"""The keys that a class takes, and the closed set of values that it accepts for one, read from its source.

A class that refuses `layout not in LAYOUTS`, LAYOUTS a constant of its module or of one that it imports from, has said
all that the shell's completion and the reference need to know; importing it would import torch, which takes a second.
"""

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GIVEN = ("dim", "slot", "depth", "params")  # what the program itself gives to a `_partial_` node when it builds it


def accepts(target: str, key: str) -> list[str]:
    """The values that a class ("train.engines.FSDP") takes for a key; [] where they are open."""
    module, owner = _class(target)
    for function in owner.body if owner else ():
        if not isinstance(function, ast.FunctionDef):
            continue
        own = function.name == "__init__"  # elsewhere a bare name is something else; self.key is always the key
        for node in ast.walk(function):
            known: list[str] = []
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.NotIn):
                if _name(node.left) == key and (own or isinstance(node.left, ast.Attribute)):
                    known = _values(module, node.comparators[0])
            elif isinstance(node, ast.For) and isinstance(node.iter, ast.Call):  # for key, known in CONSTANT.items()
                if isinstance(node.iter.func, ast.Attribute) and node.iter.func.attr == "items":
                    known = _values(module, node.iter.func.value, key)
            elif own and isinstance(node, ast.Call) and any(_hands_on(word, key) for word in node.keywords):
                known = accepts(f"{module}.{_name(node.func)}", key)
            if known:
                return known
    return []


def _hands_on(word: ast.keyword, key: str) -> bool:
    """Says whether `key=key`: the constructor leaves it to another's, of a class that its module has or imports."""
    return word.arg == key and isinstance(word.value, ast.Name) and word.value.id == key


def parameters(target: str) -> dict[str, str]:
    """The keys that a class of ours takes, each with the annotation of its type; {} for another's class."""
    module, owner = _class(target)
    if owner is None:
        return {}
    for node in owner.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            arguments = [*node.args.args[1:], *node.args.kwonlyargs]
            return {a.arg: ast.unparse(a.annotation) if a.annotation else "" for a in arguments}
    found = {k: v for base in owner.bases for k, v in parameters(f"{module}.{_name(base)}").items()}
    fields = [node for node in owner.body if isinstance(node, ast.AnnAssign)]
    return found | {str(_name(node.target)): ast.unparse(node.annotation) for node in fields}


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


def _values(module: str, node: ast.AST, key: str | None = None) -> list[str]:
    """The texts in a literal or a constant; with `key`, those in the literal that a dict constant holds under it."""
    if isinstance(node, ast.Name):
        return _constant(module, node.id, key)
    if isinstance(node, ast.Dict) and key is not None:
        inner = {k.value: v for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)}
        return _values(module, inner[key]) if key in inner else []
    elements = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
    texts = [e.value for e in elements if isinstance(e, ast.Constant) and isinstance(e.value, str)]
    return texts if key is None and len(texts) == len(elements) else []


def _constant(module: str, name: str, key: str | None) -> list[str]:
    """The values of a module's constant, or of one that it imports, inside a function perhaps."""
    for node in _module(module).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return [] if isinstance(node.value, ast.Name) else _values(module, node.value, key)
    for inner in ast.walk(_module(module)):
        if isinstance(inner, ast.ImportFrom) and inner.module not in (None, module) and not inner.level:
            for alias in inner.names:
                if (alias.asname or alias.name) == name:
                    return _constant(str(inner.module), alias.name, key)
    return []


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
