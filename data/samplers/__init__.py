"""Ways to cut documents into sequences. `PACKINGS` names them for `data.packing`.

Each is a function of the documents and the cut that gives pools: sequences of one length each, as pieces of documents,
in an order of their own in every epoch.
"""

from collections.abc import Callable
from typing import Literal

from data.samplers.best_fit import bins
from data.samplers.concat import chunks
from data.samplers.decomposition import buckets
from data.samplers.documents import Documents
from data.samplers.pool import Cut, Pool

PackingName = Literal["concat", "best_fit", "decomposition"]
PACKINGS: dict[str, Callable[[Documents, Cut], list[Pool]]] = {
    "concat": chunks,
    "best_fit": bins,
    "decomposition": buckets,
}
