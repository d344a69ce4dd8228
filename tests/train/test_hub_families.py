"""The families that need only a table, held to their classes of `transformers` at small random weights, fp32: logits,
every gradient, packed documents, the numbers after a round trip, and greedy text."""

import copy
import json
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from models.hub import ARCHITECTURES, of_config, tensors
from models.sequence import Whole
from tests.train.test_hub import NO_TOKENS, SEQ, TOKENS, close, loaded
from train.checkpoints import checkpoint
from train.checkpoints.hf_convert import Saved, give, take
from train.checkpoints.hf_reader import Published

transformers = pytest.importorskip("transformers", minversion="5")

SIZES = {"vocab_size": 72, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
DENSE = SIZES | {"intermediate_size": 40, "num_key_value_heads": 2}
THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}
SSM = {"mamba_n_heads": 4, "mamba_d_state": 6, "mamba_n_groups": 1, "mamba_chunk_size": 16}
FACTORS = {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22}
FACTORS |= {"attention_multiplier": 0.25}
HYBRID = {"layer_types": ["mamba", "attention", "mamba"], "num_hidden_layers": 3, "num_local_experts": 0}
HYBRID |= {"shared_intermediate_size": 20}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 4}
DELTA |= {"layer_types": ["linear_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
YARN = {"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0, "original_max_position_embeddings": 16}
ROPES = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 3e3}}
ROPES = {"rope_parameters": ROPES}
LINEAR = {"full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0}}
LINEAR = {"rope_parameters": LINEAR | {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
SIGMOID = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_shared_experts": 1}
LATENT = {"num_key_value_heads": 4, "head_dim": 4, "q_lora_rank": 12, "kv_lora_rank": 8, "v_head_dim": 10, "n_group": 1}
LATENT |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "topk_group": 1}
GATED = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
KIMI = {key: LATENT[key] for key in LATENT if key not in ("head_dim", "q_lora_rank")} | {"linear_conv_kernel_dim": 3}
KIMI |= {"linear_head_dim": 6, "linear_num_heads": 4, "num_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
KIMI |= {"moe_intermediate_size": 12}
NEMOTRON = DENSE | {"mamba_num_heads": 4, "mamba_head_dim": 12, "ssm_state_size": 6, "n_groups": 2, "chunk_size": 16}
NEMOTRON |= {"n_routed_experts": 3, "moe_intermediate_size": 12, "moe_shared_expert_intermediate_size": 20}
del NEMOTRON["num_hidden_layers"]
FALCON = DENSE | {"mamba_d_ssm": 48, "mamba_n_heads": 4, "mamba_d_state": 6, "mamba_n_groups": 2}
FALCON |= {"mamba_chunk_size": 16, "embedding_multiplier": 5.6, "lm_head_multiplier": 0.3, "key_multiplier": 0.4}
FALCON |= {"attention_in_multiplier": 1.2, "attention_out_multiplier": 0.9, "ssm_in_multiplier": 1.3}
FALCON |= {"ssm_out_multiplier": 0.8, "mlp_multipliers": [0.9, 0.6], "ssm_multipliers": [0.7, 0.9, 1.4, 0.5, 1.1]}
MINIMAX = {"num_local_experts": 3, "block_size": 16, "layer_types": ["linear_attention", "full_attention"]}
MINIMAX |= {"full_attn_alpha_factor": 3.5, "linear_attn_alpha_factor": 2.5, "mlp_alpha_factor": 1.5}
MINIMAX |= {"full_attn_beta_factor": 1.2, "linear_attn_beta_factor": 0.9, "mlp_beta_factor": 0.7}
CAPS = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.5}
RECURRENT = {key: DENSE[key] for key in DENSE if key != "head_dim"} | {"logits_soft_cap": 1.5}
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
    "bamba": ("Bamba", DENSE | SSM | {"num_hidden_layers": 3, "attn_layer_indices": [1], "head_dim": 8}),
    "qwen3_5": ("Qwen3_5", DENSE | DELTA | {"head_dim": 16}),
    "qwen3_5, experts": (
        "Qwen3_5Moe",
        SIZES
        | DELTA
        | {"head_dim": 16, "num_key_value_heads": 1, "num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "tie_word_embeddings": True},
    ),
    "granite": ("Granite", DENSE | FACTORS | {"tie_word_embeddings": True} | THETA),
    "granite, untied": ("Granite", DENSE | FACTORS | {"head_dim": 12}),
    "granite_hybrid": ("GraniteMoeHybrid", DENSE | SSM | FACTORS | HYBRID | {"tie_word_embeddings": True}),
    "granite_hybrid, positions": (
        "GraniteMoeHybrid",
        DENSE | SSM | FACTORS | HYBRID | {"position_embedding_type": "rope", "mamba_n_groups": 2},
    ),
    "qwen2": ("Qwen2", DENSE | THETA),
    "qwen2, windows": (
        "Qwen2",
        DENSE | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen2_moe": ("Qwen2Moe", DENSE | EXPERTS | {"shared_expert_intermediate_size": 20, "mlp_only_layers": [1]}),
    "qwen2_moe, windows": (
        "Qwen2Moe",
        DENSE
        | EXPERTS
        | {"shared_expert_intermediate_size": 20, "qkv_bias": False, "norm_topk_prob": True}
        | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    ),
    "seed_oss": ("SeedOss", DENSE | {"head_dim": 16} | THETA),
    "seed_oss, all biases": ("SeedOss", DENSE | {"attention_out_bias": True, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2", DENSE | THETA),
    "olmo2, biases": ("Olmo2", DENSE | {"attention_bias": True, "tie_word_embeddings": True}),
    "olmo3": ("Olmo3", DENSE | {"num_hidden_layers": 4, "sliding_window": 9} | ROPES),
    "olmo3, full": ("Olmo3", DENSE | {"sliding_window": 9, "layer_types": ["full_attention"] * 2}),
    "olmoe": ("Olmoe", DENSE | {"num_experts": 4, "num_experts_per_tok": 2}),
    "olmoe, biases": (
        "Olmoe",
        DENSE | {"num_experts": 3, "num_experts_per_tok": 2, "norm_topk_prob": True, "attention_bias": True} | THETA,
    ),
    "exaone4": ("Exaone4", DENSE | {"num_hidden_layers": 4, "sliding_window": 9} | THETA),
    "exaone4, full": (
        "Exaone4",
        DENSE | {"sliding_window": None, "layer_types": ["full_attention"] * 2, "head_dim": 16},
    ),
    "gemma": ("Gemma", DENSE | THETA),
    "gemma, untied": ("Gemma", DENSE | {"tie_word_embeddings": False, "attention_bias": True, "head_dim": 12}),
    "gemma3": ("Gemma3", DENSE | {"num_hidden_layers": 3, "sliding_window": 9, "query_pre_attn_scalar": 5} | MIXED),
    "gemma3, full": (
        "Gemma3",
        DENSE | {"sliding_window": 9, "layer_types": ["full_attention"] * 2, "attention_bias": True} | LINEAR,
    ),
    "glm": ("Glm", DENSE | {"head_dim": 16} | THETA),
    "glm, no biases": ("Glm", DENSE | {"attention_bias": False, "tie_word_embeddings": True}),
    "glm4": ("Glm4", DENSE | {"head_dim": 16} | THETA),
    "glm4, no biases": ("Glm4", DENSE | {"attention_bias": False, "tie_word_embeddings": True}),
    "glm4_moe": ("Glm4Moe", DENSE | SIGMOID | {"attention_bias": True} | THETA),
    "glm4_moe, norms and groups": (
        "Glm4Moe",
        DENSE
        | SIGMOID
        | {"use_qk_norm": True, "n_routed_experts": 6, "n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5}
        | {"n_shared_experts": 2, "first_k_dense_replace": 0},
    ),
    "minimax_m2": ("MiniMaxM2", DENSE | {"num_local_experts": 4, "num_experts_per_tok": 2} | THETA),
    "minimax_m2, partial": (
        "MiniMaxM2",
        DENSE | {"num_local_experts": 3, "num_experts_per_tok": 2, "rotary_dim": 4, "tie_word_embeddings": True},
    ),
    "dots1": ("Dots1", DENSE | SIGMOID | {"first_k_dense_replace": 1} | THETA),
    "dots1, windows and groups": (
        "Dots1",
        DENSE
        | SIGMOID
        | {"n_routed_experts": 6, "n_group": 3, "topk_group": 2, "norm_topk_prob": True, "attention_bias": True}
        | {"sliding_window": 9, "max_window_layers": 1},
    ),
    "deepseek_v3": ("DeepseekV3", DENSE | SIGMOID | LATENT | {"first_k_dense_replace": 1} | THETA),
    "deepseek_v3, yarn": (
        "DeepseekV3",
        DENSE
        | SIGMOID
        | LATENT
        | {"first_k_dense_replace": 0, "q_lora_rank": None, "attention_bias": True, "n_group": 2, "topk_group": 1}
        | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
    ),
    "deepseek_v3, halves": (
        "DeepseekV3",
        DENSE | SIGMOID | LATENT | {"rope_interleave": False, "first_k_dense_replace": 0},
    ),
    "olmo_hybrid": ("OlmoHybrid", DENSE | GATED | {"layer_types": DELTA["layer_types"]} | THETA),
    "olmo_hybrid, no positions": (
        "OlmoHybrid",
        DENSE
        | GATED
        | {"layer_types": DELTA["layer_types"], "attention_bias": True, "linear_allow_neg_eigval": False}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
    ),
    "lfm2": ("Lfm2", DENSE | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8} | THETA),
    "lfm2, biases": (
        "Lfm2",
        DENSE
        | {"full_attn_idxs": [0], "conv_bias": True, "conv_L_cache": 4, "tie_word_embeddings": False}
        | {"block_auto_adjust_ff_dim": False},
    ),
    "falcon_mamba": ("FalconMamba", {"vocab_size": 72, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 5}),
    "jamba": (
        "Jamba",
        {key: DENSE[key] for key in DENSE if key != "head_dim"}
        | {"num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 4}
        | {"num_experts": 4, "num_experts_per_tok": 2},
    ),
    "jamba, dense": (
        "Jamba",
        {key: DENSE[key] for key in DENSE if key != "head_dim"}
        | {"attn_layer_period": 2, "attn_layer_offset": 0, "num_experts": 1, "mamba_conv_bias": False}
        | {"mamba_dt_rank": 3, "mamba_expand": 3, "tie_word_embeddings": True},
    ),
    "arcee": ("Arcee", DENSE | THETA),
    "arcee, biases": ("Arcee", DENSE | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "granite_hybrid, experts": ("GraniteMoeHybrid", DENSE | SSM | FACTORS | HYBRID | {"num_local_experts": 4}),
    "granite_moe": (
        "GraniteMoe",
        DENSE | FACTORS | {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True} | THETA,
    ),
    "granite_moe, shared": (
        "GraniteMoeShared",
        DENSE | FACTORS | {"num_local_experts": 3, "num_experts_per_tok": 2, "shared_intermediate_size": 20},
    ),
    "ernie_moe": (
        "Ernie4_5_Moe",
        DENSE | {"moe_intermediate_size": 12, "moe_k": 2, "moe_num_experts": 3, "num_hidden_layers": 3},
    ),
    "ernie_moe, places": (
        "Ernie4_5_Moe",
        DENSE
        | {"moe_intermediate_size": 12, "moe_k": 2, "moe_num_experts": 4, "num_hidden_layers": 4}
        | {"moe_num_shared_experts": 0, "moe_layer_interval": 2, "tie_word_embeddings": False},
    ),
    "nemotron": ("Nemotron", DENSE | THETA),
    "nemotron, biases": (
        "Nemotron",
        DENSE | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "nemotron_h": (
        "NemotronH",
        NEMOTRON | {"layers_block_type": ["linear_attention", "mlp", "full_attention", "moe"]},
    ),
    "nemotron_h, groups": (
        "NemotronH",
        NEMOTRON
        | {"layers_block_type": ["moe", "full_attention", "linear_attention"], "n_routed_experts": 4, "n_group": 2}
        | {"topk_group": 1, "routed_scaling_factor": 2.5, "time_step_min": 0.3, "use_conv_bias": False},
    ),
    "nemotron_h, latent": (
        "NemotronH",
        NEMOTRON | {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "moe_latent_size": 8},
    ),
    "falcon_h1": ("FalconH1", FALCON),
    "falcon_h1, norms": (
        "FalconH1",
        FALCON | {"mamba_rms_norm": True, "tie_word_embeddings": True, "mamba_d_ssm": None, "mamba_expand": 1},
    ),
    "falcon_h1, gated norms": (
        "FalconH1",
        FALCON | {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "num_hidden_layers": 1},
    ),
    "minimax": ("MiniMax", DENSE | MINIMAX),
    "minimax, window": (
        "MiniMax",
        DENSE | {"num_local_experts": 3, "sliding_window": 9, "tie_word_embeddings": True, "num_hidden_layers": 3},
    ),
    "gemma2": (
        "Gemma2",
        DENSE | {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 24} | THETA | CAPS,
    ),
    "gemma2, no caps": (
        "Gemma2",
        DENSE
        | {"attention_bias": True, "layer_types": ["full_attention"] * 2, "attn_logit_softcapping": None}
        | {"final_logit_softcapping": None, "tie_word_embeddings": False},
    ),
    "vault_gemma": ("VaultGemma", DENSE | {"sliding_window": 9, "query_pre_attn_scalar": 24} | CAPS),
    "gpt_oss": (
        "GptOss",
        DENSE
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9, "head_dim": 12}
        | {"rope_parameters": YARN | {"truncate": False}},
    ),
    "gpt_oss, no biases": (
        "GptOss",
        DENSE | {"num_local_experts": 3, "num_experts_per_tok": 2, "attention_bias": False, "num_hidden_layers": 1},
    ),
    "kimi_linear": (
        "KimiLinear",
        DENSE
        | KIMI
        | {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "kimi_linear, groups": (
        "KimiLinear",
        DENSE
        | KIMI
        | {"layer_types": DELTA["layer_types"], "mlp_layer_types": ["sparse", "sparse"], "n_group": 2, "topk_group": 1}
        | {"q_lora_rank": 12, "attention_bias": True, "norm_topk_prob": False, "linear_head_dim": 10},
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        RECURRENT | {"block_types": ["recurrent", "attention"], "attention_window_size": 9, "lru_width": 48},
    ),
    "recurrent_gemma, biases": (
        "RecurrentGemma",
        RECURRENT | {"num_hidden_layers": 3, "attention_bias": True, "conv1d_width": 3} | THETA,
    ),
}
LENGTHS = (11, 4, 30)  # of documents in one row


def theirs(name):
    """A small random model of transformers, every parameter away from where it would not be seen."""
    kind, sizes = copy.deepcopy(FAMILIES[name])  # a configuration writes into the tables that it is given
    text = "Text" if kind.startswith(("Qwen3_5", "Gemma3")) else ""  # the other is that of a model with pictures
    config = getattr(transformers, f"{kind}{text}Config")(**sizes, **NO_TOKENS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("correction_bias"))):
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def gradients(model, logits):
    """Leaves those of the cross-entropy of the next token."""
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    model.zero_grad()
    loss.backward()


def filled(told, name, value, rows):
    """A parameter of ours where every published number is `value`."""
    with patch.object(told, "_published", lambda source, start, n: torch.full_like(told_rows(told, source, n), value)):
        return told.read(name, 0, rows)


def told_rows(told, source, number):
    return torch.empty(number, *told._stored[source].shape[1:], dtype=told._stored[source].dtype)


def held_to(found, ours, model, folder):
    """Every gradient of ours is that of `model`, which is read as weights are. A parameter of ours is a + b·theirs, so
    what is read of their gradient is a + b²·ours."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.double()  # a norm's gradient is read as 1 + g: in fp32 that would round it
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)  # a router's bias of ERNIE has none
    model.save_pretrained(folder)
    model.float()
    told = Published(folder)
    # The gradient of Gated DeltaNet's decay is tiny: theirs in fp32 is 3e-4 off ours in fp64, ours in fp32 1e-6. Both
    # sides round: of Kimi Linear's embedding by 1.06e-5 together with torch 2.14.
    least = 1e-7 * torch.stack([p.grad.norm() for p in ours.parameters()]).norm()
    for name, p in ours.named_parameters():
        read = told.read(name, 0, len(p))
        zero, unit = (filled(told, name, value, len(p)) for value in (0.0, 1.0))
        want = (read - zero) / (unit - zero) ** 2
        assert p.grad is not None and want.norm() > 0, name
        assert (p.grad - want).norm() <= 2e-5 * want.norm() + least, (
            name,
            ((p.grad - want).norm() / want.norm()).item(),
        )
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])


def at_once(saved):
    """Reads all parameters in one go: for small ones the way to each costs more than all of them (test_hub.py takes
    it)."""
    values = {name: torch.empty(shape) for name, shape in saved.shapes.items()}
    checkpoint.read({"model": values}, saved.path, alone=True)
    saved._own = lambda name: values[name] * saved._scales.get(name, 1.0)


@pytest.mark.parametrize(
    "name", [name if "," not in name else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_is_its_class_of_transformers(name, tmp_path):
    """Logits and gradients of what lies in their folder; in and out again: the same numbers, class and greedy text."""
    model, folder = theirs(name), tmp_path / "folder"
    model.save_pretrained(folder)
    found = Published(folder)
    assert all("_decay" in x or "slope" in x for x in found.left_out) and found.name == type(model).__name__
    ours = loaded(found.model, folder)
    want, got = model(TOKENS).logits, ours(TOKENS, SEQ).logits
    close(got, want)
    with torch.no_grad():
        alone = torch.cat([model(part).logits for part in TOKENS[:1].split(LENGTHS, 1)], 1)
        close(ours(TOKENS[:1], Whole.of(torch.cat([torch.arange(n) for n in LENGTHS])[None])).logits, alone)
    gradients(model, want)
    gradients(ours, got)
    held_to(found, ours, model, tmp_path / "gradients")
    assert found.unpublishable is None
    out = Saved(
        take(found, tmp_path / "run", {}, lambda name: None), {"model": found.model, "data": {"max_length": 77}}
    )
    at_once(out)
    give(out, tmp_path / "back", {}, config=NO_TOKENS)
    names = ARCHITECTURES[found.name].unstacked
    before, after = names(tensors.folder(folder)), names(tensors.folder(tmp_path / "back"))
    before = {key: each for key, each in before.items() if key not in found.left_out}
    assert before.keys() == after.keys()
    # Norms about zero lose a last digit; Granite's factors stay in the weights that took them in.
    computed = {
        piece.source
        for each in found._entries.values()
        for piece in each.pieces
        if each.form.computed or piece.factor != 1
    }
    if found.model["tied_scale"] not in (None, 1.0):
        computed.add(found._entries["norm.weight"].pieces[0].source)
    for key, each in before.items():
        rows = [tensors.rows(x, 0, each.shape[0]) for x in (each, after[key])]
        if name == "deepseek_v3, halves":  # which goes out with its pairs side by side
            rows = [x.flatten().sort().values for x in rows]
        assert torch.equal(*rows) or key in computed, key
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


def without(place, *path):
    """Takes the norm or the other part there away."""

    def change(model):
        owner = model.layers[place]
        for part in path[:-1]:
            owner = owner[part] if isinstance(part, int) else getattr(owner, part)
        if isinstance(path[-1], int):
            owner[path[-1]] = torch.nn.Identity()
        else:
            setattr(owner, path[-1], torch.nn.Identity())

    return change


def other(place, *path):
    """Gives the attribute there another value, the last of `path`."""

    def change(model):
        owner = model if place is None else model.layers[place]
        for part in path[:-2]:
            owner = getattr(owner, part)
        setattr(owner, path[-2], path[-1])

    return change


def unconvolved(model):
    model.layers["0"].mixer.conv.forward = lambda x, seq, slot: x


BROKEN = {
    "a norm behind the mixer": ("olmo2", without("0", "mixer_post_norm")),
    "a norm behind the feed-forward": ("gemma3", without("1", "ffn_post_norm")),
    "a norm over the keys of all heads": ("olmo2", without("0", "mixer", "k_norm")),
    "a norm of a step size": ("jamba", without("0", "mixer", "norms", 0)),
    "the norm of kimi's latents": ("kimi_linear", without("1", "mixer", "kv_norm")),
    "kimi's strengths of writes": ("kimi_linear", other("0", "mixer", "strongest", 2.0)),
    "the norm of latents": ("deepseek_v3", without("0", "mixer", "kv_norm")),
    "the scale of latents": ("deepseek_v3", other("0", "mixer", "factor", 1.0)),
    "a gated convolution": ("lfm2", unconvolved),
    "a mixer beside": ("falcon_h1", other("1", "beside", None)),
    "a normed stream": ("minimax", other("0", "from_normed", False)),
    "a scaled stream": ("minimax", other("1", "scales", (1.0, 1.0))),
    "a least step size": ("nemotron_h, groups", other("2", "mixer", "dt_min", 0.0)),
    "the sinks": ("gpt_oss", other("0", "mixer", "sink_logits", None)),
    "the biases of experts": ("gpt_oss", other("0", "ffn", "experts", "down_bias", None)),
    "the cap of scores": ("gemma2", other("1", "mixer", "softcap", None)),
    "the cap of logits": ("recurrent_gemma", other(None, "logit_softcap", None)),
    "the place of a norm by a gate": ("falcon_h1, norms", other("0", "mixer", "out_norm", "gated")),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", BROKEN)
@torch.no_grad()
def test_a_part_that_is_broken_is_seen(what, tmp_path):
    """The comparison above would be red without it."""
    name, breaks = BROKEN[what]
    model = theirs(name)
    model.save_pretrained(tmp_path)
    ours = loaded(Published(tmp_path).model, tmp_path)
    want = model(TOKENS).logits
    close(ours(TOKENS, SEQ).logits, want)
    breaks(ours)
    assert (ours(TOKENS, SEQ).logits - want).norm() > 1e-4 * want.norm()


@pytest.mark.parametrize("name", ["olmo2", "deepseek_v3", "lfm2", "jamba", "gpt_oss", "nemotron_h"])
def test_five_steps_of_training_are_those_of_transformers(name, tmp_path):
    """One family for each kind of block: the losses of both, each step of plain gradient descent taken by both."""
    model = theirs(name)
    model.save_pretrained(tmp_path / "folder")
    found = Published(tmp_path / "folder")
    ours = loaded(found.model, tmp_path / "folder")
    losses = []
    for _ in range(5):
        each = []
        for one, logits in ((model, model(TOKENS).logits), (ours, ours(TOKENS, SEQ).logits)):
            gradients(one, logits)
            with torch.no_grad():
                for p in one.parameters():
                    p -= 0.05 * p.grad
            each.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).item())
        losses.append(each)
    assert losses[4][0] < losses[0][0]
    for want, got in losses:
        assert got == pytest.approx(want, rel=1e-5)


def test_a_routers_bias_is_read_into_its_buffer_and_moves_the_choices(tmp_path):
    """Without it the logits are others: the bias is away from zero in the models above."""
    model = theirs("glm4_moe")
    model.save_pretrained(tmp_path)
    found = Published(tmp_path)
    ours = loaded(found.model, tmp_path)
    router = ours.layers["1"].ffn.router
    assert torch.equal(router.selection_bias, model.model.layers[1].mlp.gate.e_score_correction_bias)
    assert not [name for name in found.manifest()["model"] if name.endswith("selection_bias")]  # weights alone
    with torch.no_grad():
        before = ours(TOKENS, SEQ).logits
        router.selection_bias.copy_(torch.tensor([9.0, 0.0, 0.0, 9.0]))
        assert (ours(TOKENS, SEQ).logits - before).norm() > 1e-3 * before.norm()


@torch.no_grad()
def test_the_text_of_a_model_that_sees_is_read_and_its_pictures_left_out(tmp_path):
    text = FAMILIES["qwen3_5"][1]
    sees = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5Config(text_config=text | NO_TOKENS, vision_config=sees, tie_word_embeddings=False)
    model = transformers.Qwen3_5ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "in")
    found = Published(tmp_path / "in")
    assert found.name == "Qwen3_5ForCausalLM" and found.left_out
    assert all(name.startswith("model.visual.") for name in found.left_out)
    close(loaded(found.model, tmp_path / "in")(TOKENS, SEQ).logits, model(TOKENS).logits)
    whole = json.loads((tmp_path / "in/config.json").read_text())
    (tmp_path / "in/config.json").write_text(json.dumps({key: whole[key] for key in whole if key != "text_config"}))
    with pytest.raises(ValueError, match="config.json: text_config: missing"):
        Published(tmp_path / "in")


def test_the_published_table_of_kimi_linears_layers_is_read():
    """Layers are counted from 1 there, and sizes lie in a table."""
    kind, sizes = FAMILIES["kimi_linear"]
    flat = sizes | {"architectures": [f"{kind}ForCausalLM"]}
    table = {"num_heads": 4, "head_dim": 6, "short_conv_kernel_size": 3, "kda_layers": [1, 3], "full_attn_layers": [2]}
    left = ("layer_types", "linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim", "num_experts_per_tok")
    own = {key: value for key, value in flat.items() if key not in left}
    own |= {"linear_attn_config": table, "num_experts_per_token": 2, "first_k_dense_replace": 1, "moe_layer_freq": 1}
    assert of_config(own).read(own) == of_config(flat).read(flat)
    for change, line in (
        ({"kda_layers": [1, 2, 3]}, "linear_attn_config: must name each of num_hidden_layers=3 once"),
        ({"kda_layers": "x"}, "linear_attn_config.kda_layers=x: must be a list of numbers"),
    ):
        wrong = own | {"linear_attn_config": table | change}
        with pytest.raises(ValueError) as refused:
            of_config(wrong).read(wrong)
        assert str(refused.value) == f"config.json: {line}"


@pytest.mark.parametrize(
    ("name", "change", "line"),
    [
        ("smollm3", {"no_rope_layers": [1, 2, 1, 1]}, "no_rope_layers=[1, 2, 1, 1]: must be 4 of 0, 1"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "layer_types=['sliding_attention', 'sliding_attention']"),
        ("qwen3", {"attention_bias": True}, "attention_bias=true: must be false"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "rope_type=longrope: must be default for Phi3ForCausalLM"),
        ("ernie", {"use_bias": True}, "use_bias=true: must be false"),
        ("mamba", {"use_bias": True}, "use_bias=true: must be false"),
        ("mamba", {"time_step_rank": "x"}, "time_step_rank=x: must be auto, or a whole number of at least 1"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok=5: must be at most num_local_experts=4"),
        ("bamba", {"mamba_proj_bias": True}, "mamba_proj_bias=true: must be false"),
        ("bamba", {"time_step_limit": [0.0, 1.0]}, "time_step_limit=[0.0, 1.0]: must be [0, Infinity]"),
        ("bamba", {"attn_layer_indices": [3]}, "attn_layer_indices=[3]: 3 must be below 3"),
        ("qwen2", {"layer_types": ["x", "x"]}, "layer_types=['x', 'x']: must be 2 of full_attention, sliding_att"),
        ("qwen2_moe", {"qkv_bias": 1}, "qkv_bias=1: must be true or false"),
        ("seed_oss", {"mlp_bias": True}, "mlp_bias=true: must be false"),
        (
            "olmo3",
            {"rope_parameters": {"rope_type": "yarn"}},
            "rope_parameters={'rope_type': 'yarn'}: must be tables of",
        ),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0: must be null"),
        ("exaone4", {"sliding_window_pattern": "LX"}, "sliding_window_pattern=LX: must be a whole number, a word of L"),
        ("gemma", {"hidden_act": "silu"}, "hidden_act=silu: must be gelu_pytorch_tanh, gelu, "),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0: must be null"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=true: must be false, or null"),
        ("glm", {"head_dim": 10**6}, "head_dim=1000000: must be at most 16384 for 4 heads"),
        ("glm4_moe", {"n_group": 3}, "n_group=3: must divide n_routed_experts=4"),
        ("glm4_moe", {"n_group": 2, "topk_group": 3}, "topk_group=3: must be at most n_group=2"),
        ("minimax_m2", {"num_experts_per_tok": 9}, "num_experts_per_tok=9: must be at most 4"),
        ("dots1", {"moe_intermediate_size": 1.5}, "moe_intermediate_size=1.5: must be a whole number"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads=2: must be num_attention_heads=4"),
        ("deepseek_v3", {"model_type": "kimi_k3"}, "model_type=kimi_k3: must be deepseek_v3, that of DeepseekV3For"),
        ("olmo_hybrid", {"layer_types": ["full_attention"] * 2}, "layer_types=['full_attention', 'full_attention']"),
        ("lfm2", {"layer_types": ["conv", "x"]}, "layer_types=['conv', 'x']: must be 2 of conv, full_attention"),
        ("falcon_mamba", {"mixer_rms_eps": 0}, "mixer_rms_eps=0: must be a number above 0"),
        ("jamba", {"attn_layer_offset": 3}, "attn_layer_offset=3: must be below attn_layer_period=3"),
        ("arcee", {"hidden_act": "silu"}, "hidden_act=silu: must be relu2"),
        ("granite", {"residual_multiplier": 0}, "residual_multiplier=0: must be a number above 0"),
        ("granite_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok=1: must be 2 to num_local_experts=4"),
        ("ernie_moe", {"moe_norm_min": 0.1}, "moe_norm_min=0.1: must be 1e-12"),
        ("ernie_moe", {"moe_layer_start_index": 7}, "moe_layer_start_index=7: must leave a layer with experts"),
        ("nemotron", {"hidden_act": "silu"}, "hidden_act=silu: must be relu2"),
        ("nemotron_h", {"layers_block_type": ["mlp", "x"]}, "layers_block_type=['mlp', 'x']: must be of linear_atten"),
        ("nemotron_h", {"moe_latent_size": 0}, "moe_latent_size=0: must be a whole number of at least 1, or null"),
        ("falcon_h1", {"ssm_multipliers": [1.0]}, "ssm_multipliers=[1.0]: must be 5 numbers"),
        ("falcon_h1", {"key_multiplier": 0}, "key_multiplier=0: must be a number above 0"),
        ("minimax", {"layer_types": ["x"] * 2}, "layer_types=['x', 'x']: must be 2 of full_attention, linear_attent"),
        ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping=0: must be a number above 0, or null"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit=5.0: must be 7.0"),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config: must be absent"),
        (
            "kimi_linear",
            {"layer_types": ["x"] * 3},
            "layer_types=['x', 'x', 'x']: must be 3 of full_attention, linear_att",
        ),
        (
            "kimi_linear",
            {"mlp_layer_types": ["sparse", "dense"]},
            "mlp_layer_types=['sparse', 'dense']: must be dense, ",
        ),
        ("kimi_linear", {"mla_use_nope": False}, "mla_use_nope=false: must be true"),
        ("kimi_linear", {"linear_attn_config": 3}, "linear_attn_config=3: must be a table"),
        ("recurrent_gemma", {"block_types": ["x"]}, "block_types=['x']: must be of recurrent, attention"),
        ("recurrent_gemma", {"intermediate_size": 41}, "intermediate_size=41: must be even"),
        ("granite_hybrid", {"layer_types": ["x"] * 3}, "layer_types=['x', 'x', 'x']: must be 3 of attention, "),
        ("granite_hybrid", {"position_embedding_type": "nope"}, "position_embedding_type=nope: must be rope, or null"),
    ],
)
def test_a_value_that_no_layer_has_is_refused_by_its_key(name, change, line):
    kind, sizes = FAMILIES[name]
    config = sizes | {"architectures": [f"{kind}ForCausalLM"]} | change
    with pytest.raises(ValueError) as refused:
        of_config(config).read(config)
    assert str(refused.value).startswith(f"config.json: {line}")
