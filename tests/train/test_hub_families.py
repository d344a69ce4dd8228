"""The families that need only a table, held to their classes of `transformers` at small random weights, fp32: logits,
every gradient, packed documents, the numbers after a round trip, and greedy text."""

import pytest
import torch
import torch.nn.functional as F

from models.hub import tensors
from models.sequence import Whole
from tests.train.test_hub import NO_TOKENS, SEQ, TOKENS, close, loaded
from train.checkpoints.hf_convert import Saved, give, take
from train.checkpoints.hf_reader import Published

transformers = pytest.importorskip("transformers", minversion="5")

SIZES = {"vocab_size": 72, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
DENSE = SIZES | {"intermediate_size": 40, "num_key_value_heads": 2}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
# As they are published, at small sizes; those after the first of a family have its other flags.
FAMILIES = {
    "qwen3": ("Qwen3", DENSE | {"head_dim": 16, "tie_word_embeddings": True} | THETA),
    "qwen3, windows": ("Qwen3", DENSE | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "mistral": ("Mistral", DENSE | {"head_dim": 12, "sliding_window": None} | THETA),
    "mistral, window": ("Mistral", DENSE | {"head_dim": None, "sliding_window": 7}),
    "mixtral": ("Mixtral", DENSE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral, window": ("Mixtral", DENSE | {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 7}),
    "smollm3": ("SmolLM3", DENSE | {"num_hidden_layers": 4}),
    "smollm3, windows": (
        "SmolLM3",
        DENSE
        | {"num_hidden_layers": 3, "no_rope_layers": [0, 1, 0], "tie_word_embeddings": False}
        | {"use_sliding_window": True, "sliding_window": 9},
    ),
    "phi3": ("Phi3", DENSE | {"sliding_window": 11}),
    "phi3, partial": (
        "Phi3",
        DENSE | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
    ),
    "ernie": ("Ernie4_5", DENSE),
    "ernie, untied": ("Ernie4_5", DENSE | {"head_dim": 12, "tie_word_embeddings": False} | THETA),
    "mamba": ("Mamba", {"vocab_size": 72, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 5}),
    "mamba, flags": (
        "Mamba",
        {"vocab_size": 72, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4, "expand": 3, "conv_kernel": 3}
        | {"time_step_rank": 3, "use_conv_bias": False, "tie_word_embeddings": False},
    ),
}
LENGTHS = (11, 4, 30)  # of documents in one row


def theirs(name):
    """A small random model of transformers, every parameter away from where it would not be seen."""
    kind, sizes = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**sizes, **NO_TOKENS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def gradients(model, logits):
    """Leaves those of the cross-entropy of the next token."""
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    model.zero_grad()
    loss.backward()


def held_to(found, ours, model, folder):
    """Every gradient of ours is that of `model`, which is read as weights are. A parameter of ours is a + b·theirs, so
    what is read of their gradient is a + b²·ours."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.grad)
    model.save_pretrained(folder)
    told = Published(folder)
    for name, p in ours.named_parameters():
        read = told.read(name, 0, len(p))
        form = told._entries[name].form
        zero, unit = (form.here(form.there(torch.full_like(p, 0.0)) * 0 + value) for value in (0.0, 1.0))
        want = (read - zero) / (unit - zero) ** 2
        assert p.grad is not None and want.norm() > 0, name
        close(p.grad, want, 1e-5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])


@pytest.mark.parametrize(
    "name", [name if "," not in name else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_is_its_class_of_transformers(name, tmp_path):
    """Logits and gradients of what lies in their folder; in and out again: the same numbers, class and greedy text."""
    model, folder = theirs(name), tmp_path / "folder"
    model.save_pretrained(folder)
    found = Published(folder)
    assert not found.left_out and found.unpublishable is None and found.name == type(model).__name__
    ours = loaded(found.model, folder)
    want, got = model(TOKENS).logits, ours(TOKENS, SEQ).logits
    close(got, want)
    with torch.no_grad():
        alone = torch.cat([model(part).logits for part in TOKENS[:1].split(LENGTHS, 1)], 1)
        close(ours(TOKENS[:1], Whole.of(torch.cat([torch.arange(n) for n in LENGTHS])[None])).logits, alone)
    gradients(model, want)
    gradients(ours, got)
    held_to(found, ours, model, tmp_path / "gradients")
    out = Saved(
        take(found, tmp_path / "run", {}, lambda name: None), {"model": found.model, "data": {"max_length": 77}}
    )
    give(out, tmp_path / "back", {}, config=NO_TOKENS)
    before, after = tensors.folder(folder), tensors.folder(tmp_path / "back")
    assert before.keys() == after.keys()
    for key, each in before.items():
        rows = [tensors.rows(x, 0, each.shape[0]) for x in (each, after[key])]
        assert torch.equal(*rows), key
    with torch.no_grad():
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
        assert type(again) is type(model)
        close(again(TOKENS).logits, want)
        tokens = TOKENS[:1, :9]
        written = again.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
        for _ in range(5):
            seq = Whole.of(torch.arange(tokens.shape[1])[None])
            tokens = torch.cat((tokens, ours(tokens, seq).logits[:, -1:].argmax(-1)), 1)
        assert torch.equal(written, tokens)
