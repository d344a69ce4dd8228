"""A step as a picture: ranks upwards, seconds to the right, a box for each group and its sequences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launch.figures import FAINT, INK, LOOK, NAMES, figure_of, save
from parallel.schedule.adaptive.cost import Costs
from parallel.schedule.adaptive.packing import Packing

_LABELLED = 0.045  # of the picture's width, from which on a box has room for its words
_MOST = 20_000  # boxes of single sequences; beyond, groups have one box each


def draw(costs: Costs, packing: Packing, lengths: Sequence[int], title: str, path: Path) -> None:
    """Colour is the size of a group; lighter boxes compute activations again; grey is the launch, white is idle.

    Writes the PNG, aside and renamed. Raises ValueError where it cannot be written.
    """
    import matplotlib
    from matplotlib.patches import Patch, Rectangle

    colours = {size: NAMES[i % len(NAMES)] for i, size in enumerate(costs.sizes)}
    ranks, launch, apart = costs.cluster.ranks, costs.model.launch, len(lengths) <= _MOST
    begin, used = 0.0, set()
    with matplotlib.rc_context(LOOK):
        figure, (axes,) = figure_of(9, 5)
        texts = []
        for shares in packing.micro_steps:
            groups = []
            axes.add_patch(Rectangle((begin, 0), launch, ranks, color=FAINT, alpha=0.35, linewidth=0))
            for share in shares:
                choice = costs.names.index(share.recompute)
                held = [[lengths[s]] for s in sorted(share.sequences, key=lambda s: -lengths[s])]
                groups.append(costs.group([n for own in held for n in own], share.first, share.size, choice))
                boxes = held if apart else [[n for own in held for n in own]]
                at, fixed = begin + launch, costs.fixed(share.size).sum()
                used.add(share.size)
                for i, own in enumerate(boxes):
                    width = costs.group(own, share.first, share.size, choice).sum() - fixed * (i > 0)
                    axes.add_patch(
                        Rectangle(
                            (at, share.first),
                            width,
                            share.size,
                            facecolor=colours[share.size],
                            alpha=0.55 if choice else 0.9,
                            edgecolor="white",
                            linewidth=0.3,
                        )
                    )
                    texts.append((at, width, share, own))
                    at += width
            begin += costs.micro_step(groups)
            axes.axvline(begin, color=INK, linewidth=0.8)
        for at, width, share, own in texts:
            if width > _LABELLED * begin and share.size > ranks / 40:
                name = f"{own[0] / 1000:.3g}K on {share.size}" if len(own) == 1 else f"{len(own)} on {share.size}"
                axes.text(at + width / 2, share.first + share.size / 2, name, ha="center", va="center", fontsize=6.5)
        axes.set(xlim=(0, begin), ylim=(0, ranks), xlabel="seconds", ylabel="rank", title=title)
        axes.grid(False)
        key = [Patch(color=colours[size], label=f"groups of {size}") for size in sorted(used)]
        key.append(Patch(color=FAINT, alpha=0.35, label="launch"))
        figure.legend(handles=key, loc="outside lower center", ncols=8, frameon=False)
        try:
            save(figure, path)
        except OSError as error:
            raise ValueError(f"run.plot={path}: cannot be written ({error.strerror})") from None
