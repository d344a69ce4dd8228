"""Hugging Face's folders: which published tensor holds which rows of ours, and which configuration says what.

An `Architecture` is data that is read in both directions: an import takes a folder's config.json to a `model` section
and its tensors' rows to our parameters, an export the same two tables the other way. Nothing here opens weights that
are pickled, and nothing needs `transformers`.
"""

from difflib import get_close_matches

from models.hub.arcee import ARCEE
from models.hub.architecture import Architecture, mixed
from models.hub.bamba import BAMBA
from models.hub.deepseek import DEEPSEEK_V3
from models.hub.dense import ERNIE, MISTRAL, PHI3, QWEN3, SMOLLM3
from models.hub.ernie_moe import ERNIE_MOE
from models.hub.falcon_h1 import FALCON_H1
from models.hub.gemma import GEMMA, GEMMA2, GEMMA3, VAULT_GEMMA
from models.hub.glm import GLM, GLM4, GLM4_MOE
from models.hub.gpt_oss import GPT_OSS
from models.hub.granite import GRANITE
from models.hub.granite_hybrid import GRANITE_HYBRID
from models.hub.granite_moe import GRANITE_MOE, GRANITE_MOE_SHARED
from models.hub.jamba import JAMBA
from models.hub.kimi_linear import KIMI_LINEAR
from models.hub.lfm2 import LFM2
from models.hub.llama import LLAMA
from models.hub.mamba import FALCON_MAMBA, MAMBA
from models.hub.mamba2 import MAMBA2
from models.hub.minimax import MINIMAX
from models.hub.mixtral import MIXTRAL
from models.hub.nemotron import NEMOTRON, NEMOTRON_H
from models.hub.olmo import EXAONE4, OLMO2, OLMO3, OLMOE
from models.hub.olmo_hybrid import OLMO_HYBRID
from models.hub.qwen2 import QWEN2, QWEN2_MOE, SEED_OSS
from models.hub.qwen3_5 import QWEN3_5, QWEN3_5_MOE, text_of
from models.hub.qwen3_moe import QWEN3_MOE
from models.hub.qwen3_next import QWEN3_NEXT
from models.hub.recurrent_gemma import RECURRENT_GEMMA
from models.hub.sparse import DOTS1, MINIMAX_M2
from models.hub.values import WORDS, shown

# In the order in which an export asks them: the first that can say a model does.
_FIRST = (LLAMA, QWEN3_MOE, QWEN3_NEXT, MAMBA2)
_MORE = (MISTRAL, QWEN3, SMOLLM3, MIXTRAL, MAMBA, PHI3, ERNIE, QWEN3_5, QWEN3_5_MOE, BAMBA, GRANITE, GRANITE_HYBRID)
_BIASED = (QWEN2, QWEN2_MOE, SEED_OSS, GLM, GLM4, GLM4_MOE)
_NORMED = (OLMO2, OLMO3, OLMOE, EXAONE4, GEMMA, GEMMA2, GEMMA3, VAULT_GEMMA)
_SQUARED = (ARCEE, NEMOTRON)
_SPARSE = (MINIMAX_M2, DOTS1, DEEPSEEK_V3, GRANITE_MOE, GRANITE_MOE_SHARED, ERNIE_MOE, GPT_OSS)
_HYBRID = (OLMO_HYBRID, LFM2, FALCON_MAMBA, JAMBA, FALCON_H1, MINIMAX, NEMOTRON_H, RECURRENT_GEMMA, KIMI_LINEAR)
_ALL = _FIRST + _MORE + _BIASED + _NORMED + _SQUARED + _SPARSE + _HYBRID
ARCHITECTURES: dict[str, Architecture] = {each.name: each for each in _ALL}


__all__ = ["ARCHITECTURES", "families", "of_config", "of_model", "text_of"]


def families() -> str:
    """A Markdown table of the architectures, as docs/hub.md has it."""
    rows = [f"| `{each.name}` | {each.told} |" for each in ARCHITECTURES.values()]
    return "\n".join(["| architecture | here |", "|---|---|", *rows]) + "\n"


def of_config(config: dict) -> Architecture:
    """The architecture that a config.json names. Raises ValueError for another, which says who names those that are
    known: a line of all of them would be too long to read."""
    named = config.get("architectures")
    for name in named or () if WORDS.holds(named) else ():
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    kind = named[0] if isinstance(named, list) and named else named
    near = get_close_matches(kind, ARCHITECTURES, 3, 0.5) if isinstance(kind, str) else []
    nearest = f"; nearest: {', '.join(near)}" if near else ""
    raise ValueError(
        f"config.json: architectures={shown(kind)}: must be one of the {len(ARCHITECTURES)} that `farspan import "
        f"--list` names{nearest}"
    )


def of_model(model: dict, origin: str | None = None) -> tuple[Architecture, dict]:
    """The architecture that can say what a `model` section says, and its config.json.

    origin: the architecture that the weights came from, which is asked first: several can say the same.

    Raises ValueError for a model that none can express: the key that stands in the way of the nearest one, which is
    told by the mixers and the feed-forwards.
    """
    placed_blocks = {name: mixed(block) for name, block in model["blocks"].items() if name in model["pattern"]}
    mixers = {block["mixer"]["_target_"] for block in placed_blocks.values()}
    mixers |= {block["beside"]["_target_"] for block in placed_blocks.values() if block.get("beside")}
    refused = None
    for architecture in sorted(ARCHITECTURES.values(), key=lambda each: each.name != origin):
        if architecture.suits(model, mixers):
            try:
                return architecture, architecture.write(model)
            except ValueError as error:  # a later one may have what this one has not
                refused = refused or error
    if refused is not None:
        raise refused
    known, pattern = ", ".join(ARCHITECTURES), f"model.pattern=[{','.join(model['pattern'])}]"
    placed = {mixer for architecture in ARCHITECTURES.values() for mixer in architecture.mixers}
    strange = [name for name in model["pattern"] if placed_blocks[name]["mixer"]["_target_"] not in placed]
    if strange:
        mixer = placed_blocks[strange[0]]["mixer"]["_target_"].rpartition(".")[2]
        raise ValueError(f"{pattern}: none of {known} has layers of {mixer}")
    for name in model["pattern"]:
        if side := placed_blocks[name].get("beside"):
            first, second = (part["_target_"].rpartition(".")[2] for part in (placed_blocks[name]["mixer"], side))
            raise ValueError(
                f"model.blocks.{name}.beside={second}: none of {known} has {second} beside {first} in this pattern"
            )
    raise ValueError(f"{pattern}: none of {known} has these mixers together")
