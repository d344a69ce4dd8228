"""T13: a mixture of memories whose tokens of a rank all go to half of the memories. The others are idle there: their
states, and the inputs that their convolutions see, come from ranks further back."""

import zlib

import pytest
import torch

from models.axes import initialise
from tests.parallel import matrix
from tests.parallel.test_matrix import red, worst
from tests.parity import DTYPE, VOCABULARY, mixer_model

pytestmark = pytest.mark.dist

HALF, NAME = VOCABULARY // 2, "a half of the memories a rank"


def parted(mixer, precision, seed=None):
    """Tokens of the first half of the vocabulary go to memories 0 and 1, the others to 2 and 3, in both layers."""
    built = initialise(mixer_model(mixer, layers=2, heads=2), seed=1)
    with torch.no_grad():
        for name, p in built.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            p.mul_(0.7).add_(0.2 * torch.randn(p.shape, generator=generator))
        built.embedding[:, 0] = torch.where(torch.arange(VOCABULARY) < HALF, 20.0, -20.0)
        for layer in built.layers.values():
            layer.mixer_norm.weight[0] = 1.0
            layer.mixer.router.weight[:, 0] = torch.tensor([5.0, 5.0, -5.0, -5.0])
    built.compute = DTYPE[precision]
    return built.to(DTYPE[precision])


def prepare():
    """A packing of four ranks' spans, of one document and a short one, and the model in place of the matrix's own."""
    matrix.model = parted
    sample = matrix.packed((70, 2))
    rank = torch.arange(72) * 4 // 72
    sample.tokens[:] = sample.tokens % HALF + HALF * (rank % 2).numpy()
    sample.targets[sample.targets >= 0] = sample.tokens[1:][sample.targets[:-1] >= 0]
    matrix.packings()[NAME] = sample


@pytest.mark.slow
def test_a_memory_that_is_idle_on_a_rank_passes_what_it_holds(run, monkeypatch):
    monkeypatch.setattr(matrix, "model", parted)
    cells = [
        matrix.Cell("mom", transport, layout, NAME, 4, "fp64")
        for transport in matrix.EFFECTS
        for layout in ("contiguous", "zigzag", "idle rank")
    ]
    prepare()
    try:
        known = matrix.truths(cells)
        gone = [p for p, g in known["mom", NAME, "fp64"].gradients.items() if not g.any()]
        assert not gone, "every memory is used"
        results = run(4, matrix.run_cells, cells, known, before=prepare, timeout=240)
    finally:
        del matrix.packings()[NAME]
    failed = red({cell: worst(list(found)) for cell, found in zip(cells, zip(*results, strict=True), strict=True)})
    assert not failed, "\n".join(failed)
