"""Keys and values that grow in place hold what copies of all of them hold."""

import pytest
import torch

from models.kernels.pieces import Piece
from models.kv_cache import Growing, KVCache


@pytest.mark.parametrize(("window", "sinks"), [(None, 0), (9, 0), (9, 2)])
def test_growing_keys_hold_what_copied_ones_do(window, sinks):
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 7, 1, width, generator=generator) for width in (3, 2))
    begun = k.clone(), v.clone()
    copied, growing = KVCache(k, v), Growing(k, v)
    place, moves = 0, 0
    for t in range(300):  # past the room that is made at a time
        new = [torch.randn(2, 1, 1, width, generator=generator) for width in (3, 2)]
        pieces = [[Piece(0, 1, past + t)] for past in (7, 4)]  # the second text is shorter
        firsts = copied.firsts(pieces)
        assert growing.firsts(pieces) == firsts
        copied, growing = (each.joined(*new).kept(pieces, firsts, window, sinks) for each in (copied, growing))
        assert torch.equal(copied.k, growing.k) and torch.equal(copied.v, growing.v) and copied.sinks == growing.sinks
        before, place = place, growing.k.untyped_storage().data_ptr()
        moves += place != before
    assert torch.equal(k, begun[0]) and torch.equal(v, begun[1])
    assert moves < 30 or sinks  # not one for each token
