"""Devices that a layout can be planned for without having one: figures that their makers publish.

`flops`: dense matmuls in bf16. `inside`: bytes a second that a device receives from those of its machine, one direction
of NVLink. `across`: the same from other machines, one network card a device. A step reaches a part of each: `REACHED`
is the share of the matmul rate that published runs of large models get to (Megatron-LM: 41% to 48% of an H100's, in its
README), and `CARRIED` that of a wire that large collectives get to.
"""

from typing import NamedTuple

from parallel.schedule.adaptive.cost import Wire

REACHED, CARRIED = 0.5, 0.8
INSIDE_LATENCY, ACROSS_LATENCY = 1e-5, 2e-5  # seconds of a collective's start
GIB = 2**30


class Device(NamedTuple):
    """memory: bytes. flops: a second. inside, across: bytes a second. ranks: of a machine. source: of the figures."""

    name: str
    memory: float
    flops: float
    inside: float
    across: float
    ranks: int
    source: str

    def wire(self, ranks: int, *, per_machine: int) -> Wire:
        """That of a group of neighbours, so many from its first to its last."""
        if ranks <= per_machine and per_machine % ranks == 0:
            return Wire(self.inside * CARRIED, INSIDE_LATENCY)
        return Wire(self.across * CARRIED, ACROSS_LATENCY)


DEVICES = {
    "a100_40g": Device("A100 40 GB", 40e9, 312e12, 300e9, 25e9, 8, "NVIDIA A100 and DGX A100 datasheets"),
    "a100": Device("A100 80 GB", 80e9, 312e12, 300e9, 25e9, 8, "NVIDIA A100 and DGX A100 datasheets"),
    "h100": Device("H100 SXM", 80e9, 989e12, 450e9, 50e9, 8, "NVIDIA H100 and DGX H100 datasheets"),
    "h200": Device("H200 SXM", 141e9, 989e12, 450e9, 50e9, 8, "NVIDIA H200 and DGX H200 datasheets"),
    "b200": Device("B200 SXM", 180e9, 2250e12, 900e9, 50e9, 8, "NVIDIA DGX B200 datasheet"),
}
