"""Draws the two pictures of docs/architecture.md: `python docs/pictures.py`.

The arrows between rooms are read from the imports of the code, so that the picture cannot say what the code does not.
"""

import ast
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
INK, FAINT, FILL, ACCENT = "#1f2933", "#9aa5b1", "#f2f5f8", "#2364aa"

# room: left, bottom, width, height, one line for each sentence
ROOMS = {
    "launch": (0.2, 6.2, 11.6, 1.3, "puts a run on machines: command line, checks, Ray, spawned processes"),
    "train": (2.0, 3.6, 4.4, 1.5, "says when: build, loop,\noptimizer, checkpoints, evaluation"),
    "data": (0.2, 0.6, 3.2, 1.6, "says which tokens,\nfrom (seed, step) alone"),
    "parallel": (3.9, 0.6, 3.1, 1.6, "says where each part\nis computed; sends it"),
    "models": (8.6, 0.6, 3.2, 1.6, "says what is computed,\nas if on one device"),
}
# arrow: where it starts, where it ends, its label (importer first)
ARROWS = {
    ("launch", "train"): ((4.2, 6.2), (4.2, 5.1), "RunConfig"),
    ("launch", "data"): ((1.0, 6.2), (1.0, 2.2), ""),
    ("launch", "parallel"): ((6.7, 6.2), (6.7, 2.2), ""),
    ("launch", "models"): ((11.0, 6.2), (11.0, 2.2), ""),
    ("train", "data"): ((2.9, 3.6), (2.4, 2.2), "batches"),
    ("train", "parallel"): ((5.0, 3.6), (5.2, 2.2), "Plan"),
    ("train", "models"): ((6.4, 4.0), (9.6, 2.2), "LM"),
    ("parallel", "models"): ((7.0, 1.2), (8.6, 1.2), "Sequence,\nDispatch"),
}


def imports() -> set[tuple[str, str]]:
    """(importer, imported) for each pair of different rooms."""
    rooms = set()
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                rooms |= {(room, name.split(".")[0]) for name in names}
    return {(one, other) for one, other in rooms if other in ROOMS and other != one}


def rooms() -> None:
    """Five rooms and every arrow between them. Raises ValueError where the code has others."""
    if wrong := imports() ^ ARROWS.keys():
        raise ValueError(f"the picture lacks or adds arrows: {sorted(wrong)}")
    figure, ax = _canvas(12, 7.8)
    for name, (x, y, width, height, text) in ROOMS.items():
        _box(ax, x, y, width, height, f"{name}/", text)
    for (importer, _), (start, end, label) in ARROWS.items():
        strong = importer != "launch" or bool(label)
        _arrow(ax, start, end, INK if strong else FAINT)
        if label:
            middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
            beside = (0.15, 0.1) if importer != "parallel" else (-0.62, 0.2)
            ax.text(middle[0] + beside[0], middle[1] + beside[1], label, color=ACCENT, fontsize=11)
    _save(figure, "rooms.svg")


def layer() -> None:
    """One linear layer on two ranks, time from left to right."""
    figure, ax = _canvas(15, 6.0)
    for rank, bottom in enumerate((4.0, 0.4)):
        _arrow(ax, (0.2, bottom + 0.8), (14.9, bottom + 0.8), FAINT)
        span = "[0, T/2)" if rank == 0 else "[T/2, T)"
        entering = "0" if rank == 0 else "act(effect of rank 0, 0)"
        _box(ax, 0.3, bottom, 2.1, 1.6, f"rank {rank}", f"tokens {span}\nx [1, T/2, D]")
        _box(ax, 2.9, bottom, 2.3, 1.6, "begin", "one pass over the span\nfrom a zero state")
        _box(ax, 5.7, bottom, 2.0, 1.6, "effect", "(A, U, alive)\nno T in its size")
        _box(ax, 9.6, bottom, 2.5, 1.6, "entering state", f"S = {entering}")
        _box(ax, 12.6, bottom, 1.9, 1.6, "finish(S)", "outputs\ny [1, T/2, D]")
    _box(ax, 7.9, 2.4, 1.6, 1.2, "cross", "a transport", fill="#dde8f5")
    _arrow(ax, (7.3, 4.0), (8.1, 3.6), ACCENT)
    _arrow(ax, (7.3, 2.0), (8.1, 2.4), ACCENT)
    _arrow(ax, (9.3, 3.6), (10.1, 4.0), ACCENT)
    _arrow(ax, (9.3, 2.4), (10.1, 2.0), ACCENT)
    ax.text(
        0.3, 2.75, "meanwhile `ahead` computes the part of the outputs\nthat waits for no state", color=INK, fontsize=11
    )
    ax.text(10.4, 2.75, "backward: the same way in reverse,\nwith A transposed", color=INK, fontsize=11)
    _save(figure, "layer.svg")


def _canvas(width: float, height: float) -> tuple[plt.Figure, Axes]:
    figure, ax = plt.subplots(figsize=(width * 0.8, height * 0.8))
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1)
    ax.set_xlim(0, width)
    ax.set_ylim(0, height)
    ax.axis("off")
    return figure, ax


def _box(ax: Axes, x: float, y: float, width: float, height: float, title: str, text: str, fill: str = FILL) -> None:
    ax.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", fc=fill, ec=INK, lw=1.2)
    )
    top = y + height - 0.34
    ax.text(x + width / 2, top, title, ha="center", va="center", fontsize=13, color=INK, weight="bold")
    ax.text(x + width / 2, (y + top - 0.2) / 2, text, ha="center", va="center", fontsize=10.5, color=INK)


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    style = {"arrowstyle": "-|>", "color": color, "lw": 1.4, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", xy=end, xytext=start, arrowprops=style, zorder=0)


def _save(figure: plt.Figure, name: str) -> None:
    """Writes the same bytes each time: no date, no random names, text as text."""
    with matplotlib.rc_context({"svg.hashsalt": "farspan", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(IMAGES / name, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    matplotlib.use("svg")
    rooms()
    layer()
