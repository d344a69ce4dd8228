"""The division of a model's layers among the ranks of a pipeline. Parameters keep their names, so that a checkpoint
knows no pipeline."""

from collections.abc import Sequence
from dataclasses import dataclass

from models.lm import LM


@dataclass(frozen=True)
class PipelineCut:
    """cuts: the layers of each stage. ranks: of the pipeline; a rank's stages lie that far apart. holders: by the name
    of each parameter, the ranks that hold it, ascending."""

    cuts: tuple[range, ...]
    ranks: int
    holders: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: LM, cuts: Sequence[range], ranks: int) -> "PipelineCut":
        """Reads it off a whole model. Several ranks hold an embedding that is the head too, or that modules of
        multi-token prediction beside the head read, and what couples layers."""
        of_layer = {str(layer): s % ranks for s, layers in enumerate(cuts) for layer in layers}
        last = (len(cuts) - 1) % ranks
        held: dict[str, tuple[int, ...]] = {}
        for name, _ in model.named_parameters():
            first, _, rest = name.partition(".")
            if first == "layers":
                held[name] = (of_layer[rest.partition(".")[0]],)
            elif first == "coupled":
                held[name] = tuple(sorted({of_layer[layer] for layer, _ in model.coupled.asking[rest]}))
            elif first == "embedding":
                held[name] = tuple(sorted({0, last})) if model.head is None or model.mtp_layers else (0,)
            else:
                held[name] = (last,)
        return cls(tuple(cuts), ranks, held)

    def stages(self, rank: int) -> range:
        """The stages of a rank."""
        return range(rank, len(self.cuts), self.ranks)

    def apply(self, model: LM, rank: int) -> None:
        """Takes from a whole model on the meta device what other ranks hold. `LM.part` of the rest works as before."""
        own = {str(layer) for s in self.stages(rank) for layer in self.cuts[s]}
        for name in [n for n in model.layers if n not in own]:
            del model.layers[name]
        for name in [n for n in model.coupled.asking if rank not in self.holders[f"coupled.{n}"]]:
            del model.coupled.asking[name]
            delattr(model.coupled, name)
        if rank not in self.holders["embedding"]:
            model.register_parameter("embedding", None)
        if rank not in self.holders["norm.weight"]:
            del model.norm
            model.depth_read = None
            model.mtp.clear()
            if model.head is not None:
                del model.head

    @property
    def shared(self) -> dict[str, tuple[int, ...]]:
        """The parameters that several ranks hold."""
        return {name: ranks for name, ranks in self.holders.items() if len(ranks) > 1}
