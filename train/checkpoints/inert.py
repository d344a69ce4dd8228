"""Pickles read without being run: what one would build, as plain data.

A pickle is a program; Python's own reader calls whatever that names. This one only notes the names and what each would
be called with, and knows no more instructions than torch's checkpoints have. Nothing is imported, called or hashed.
"""

import pickletools
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Name(NamedTuple):
    """A name that a pickle would import."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Made:
    """The call of `what` with `args` that a pickle asks for, and the state for its result."""

    what: Any
    args: Any
    state: Any = None


@dataclass(eq=False)
class InertDict:
    """A dict, as pairs: its keys may be anything."""

    items: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass(eq=False)
class Elsewhere:
    """A reference to what lies outside of the pickle: of a tensor, its bytes."""

    told: Any


class _Mark:
    pass


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINFLOAT")
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = _Mark()


def parsed(content: bytes) -> Any:
    """Returns what a pickle would build, of None, bool, int, float, str, tuple, list, and the classes above.

    Raises ValueError for what is no pickle, is cut short, or has an instruction that no checkpoint needs.
    """
    try:
        return _parsed(content)
    except (IndexError, KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        why = str(error) if isinstance(error, _RefusedError) else "is cut short, or no pickle of a checkpoint"
        raise ValueError(why) from None


class _RefusedError(ValueError):
    pass


def _parsed(content: bytes) -> Any:
    stack: list[Any] = []
    memo: list[Any] = []

    def marked() -> list[Any]:
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise IndexError
        items = stack[at + 1 :]
        del stack[at:]
        return items

    arg: Any
    for opcode, arg, _ in pickletools.genops(content):
        name = opcode.name
        if name == "MEMOIZE":
            memo.append(stack[-1])
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif name in ("BINPUT", "LONG_BINPUT"):
            if arg != len(memo):  # torch numbers them one after another
                raise IndexError
            memo.append(stack[-1])
        elif name in _VALUES:
            stack.append(arg)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _TUPLES:
            number = _TUPLES[name]
            own = tuple(stack[len(stack) - number :]) if len(stack) >= number else stack[number]
            del stack[len(stack) - number :]
            stack.append(own)
        elif name == "TUPLE":
            stack.append(tuple(marked()))
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append(InertDict())
        elif name in ("APPEND", "APPENDS"):
            more = marked() if name == "APPENDS" else [stack.pop()]
            stack[-1].extend(more)
        elif name in ("SETITEM", "SETITEMS"):
            more = marked() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            stack[-1].items.extend(zip(more[::2], more[1::2], strict=True))
        elif name == "GLOBAL":
            module, _, what = arg.partition(" ")
            stack.append(_named(module, what))
        elif name == "STACK_GLOBAL":
            what, module = stack.pop(), stack.pop()
            stack.append(_named(module, what))
        elif name in ("REDUCE", "NEWOBJ"):
            args, made = stack.pop(), stack.pop()
            stack.append(Made(made, args))
        elif name == "BUILD":
            state = stack.pop()
            stack[-1].state = state
        elif name == "BINPERSID":
            stack.append(Elsewhere(stack.pop()))
        elif name == "STOP":
            (value,) = stack
            return value
        elif name not in ("PROTO", "FRAME"):
            raise _RefusedError(f"has the instruction {name}, which no checkpoint needs")
    raise IndexError


NAMES: dict[str, tuple[str, ...]] = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": (
        *("Size", "float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool"),
        *(f"{kind}Storage" for kind in ("Double", "Float", "BFloat16", "Half", "Long", "Int", "Byte", "Bool")),
    ),
    "torch._utils": ("_rebuild_tensor_v2",),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "WindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath"),  # what Python 3.13 writes
}


def _named(module: Any, name: Any) -> Name:
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError
    if name not in NAMES.get(module, ()):
        raise _RefusedError(f"names {module}.{name}, which no checkpoint needs"[:200])
    return Name(module, name)
