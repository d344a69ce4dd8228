"""Published modules of multi-token prediction: in as modules of ours, with the loss and the gradients of their
definition, and out again with the same numbers."""

import copy
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from launch.cli import main
from models.hub import ARCHITECTURES, mtp, tensors
from models.mtp import Ahead
from models.sequence import Whole
from tests.train.test_hub import MODELS, NO_TOKENS, close, loaded
from tests.train.test_hub_families import FAMILIES, filled
from train.checkpoints.hf_convert import Saved, give, take
from train.checkpoints.hf_reader import Published

transformers = pytest.importorskip("transformers", minversion="5")

LENGTHS = (11, 1, 4, 2, 20)  # of documents in one row: some have no token two places ahead
TOKENS = torch.randint(0, 72, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
DEEPSEEK = {"embedding_norm": "enorm", "hidden_norm": "hnorm", "join": "eh_proj", "norm": "shared_head.norm"}
QWEN = {"embedding_norm": "pre_fc_norm_embedding", "hidden_norm": "pre_fc_norm_hidden", "join": "fc", "norm": "norm"}


class Case(NamedTuple):
    """sizes: of the model with the modules' layers behind its own. names: of the tensors around them. about: what their
    norms' weights are counted from."""

    sizes: dict[str, Any]
    modules: int = 1
    names: dict[str, str] = DEEPSEEK
    about: float = 0.0


def _sizes(name: str, kinds: list[str] | None, **more: Any) -> dict[str, Any]:
    sizes = MODELS["qwen3_next"][1] if name == "qwen3_next" else FAMILIES[name][1]
    return {**sizes, "num_hidden_layers": 3, **({} if kinds is None else {"layer_types": kinds}), **more}


GDN = ["linear_attention", "full_attention", "full_attention"]
CASES = {
    "qwen3_next": Case(_sizes("qwen3_next", GDN, mlp_only_layers=[0]), 1, QWEN, 1.0),
    "qwen3_5": Case(_sizes("qwen3_5", GDN), 1, QWEN, 1.0),
    "qwen3_5, experts": Case(_sizes("qwen3_5, experts", GDN), 1, QWEN, 1.0),
    "deepseek_v3": Case(_sizes("deepseek_v3", None)),
    "deepseek_v3, yarn": Case(_sizes("deepseek_v3, yarn", None), 2),
    "glm4_moe": Case(_sizes("glm4_moe", None, tie_word_embeddings=True)),
}


class Theirs(NamedTuple):
    """model: without the modules. layers: a model of each one's layer alone, whose last norm is the module's. around:
    the other weights of each, by our names."""

    model: Any
    layers: list[Any]
    around: list[dict[str, Tensor]]


def _kind(name: str) -> str:
    return "Qwen3Next" if name == "qwen3_next" else FAMILIES[name][0]


def _some_layers(whole: Any, begin: int, end: int) -> Any:
    """A model of these layers of another, with its embedding, norm and head."""
    part = copy.deepcopy(whole)
    part.model.layers = part.model.layers[begin:end]
    part.config.num_hidden_layers = part.model.config.num_hidden_layers = end - begin
    if getattr(part.config, "layer_types", None):
        part.config.layer_types = part.model.config.layer_types = part.config.layer_types[begin:end]
    return part


def theirs(name: str) -> Theirs:
    """A small random model of transformers, its last layers in modules; numbers of few bits, so that a norm's weight
    about zero is the same there and back."""
    case, kind = CASES[name], _kind(name)
    text = "Text" if kind.startswith("Qwen3_5") else ""
    config = getattr(transformers, f"{kind}{text}Config")(**copy.deepcopy(case.sizes), **NO_TOKENS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)

    def some(shape: Any, mean: float = 0.0) -> Tensor:
        return mean + (0.1 * torch.randn(shape, generator=generator)).bfloat16().float()

    with torch.no_grad():
        for p in (*whole.parameters(), *(b for n, b in whole.named_buffers() if n.endswith("correction_bias"))):
            p.copy_((p + some(p.shape)).bfloat16())
    own, D = 3 - case.modules, case.sizes["hidden_size"]
    layers, around = [_some_layers(whole, own + k, own + k + 1) for k in range(case.modules)], []
    for layer in layers:
        norms = {n: torch.nn.Parameter(some(D, 1 - case.about)) for n in ("embedding_norm", "hidden_norm", "norm")}
        around.append(norms | {"join": torch.nn.Parameter(some((D, 2 * D)))})
        layer.model.norm.weight = norms["norm"]
    return Theirs(_some_layers(whole, 0, own), layers, around)


def _place(name: str, k: int) -> str:
    return "mtp" if CASES[name].names is QWEN else f"model.layers.{3 - CASES[name].modules + k}"


def publish(name: str, model: Theirs, folder: Path, grad: bool = False, repeat: bool = True) -> Path:
    """The folder, as it would be released: modules' tensors, and with `repeat` DeepSeek's copies of the embedding and
    the head. grad: the gradients in the place of all weights."""

    def value(p: Tensor) -> Tensor:
        return p.detach().clone() if not grad else torch.zeros_like(p) if p.grad is None else p.grad.float().clone()

    def stored(part: Any, into: Path) -> dict[str, Tensor]:
        saved = copy.deepcopy(part)
        with torch.no_grad():
            for p, new in zip(saved.parameters(), map(value, part.parameters()), strict=True):
                p.copy_(new)
        saved.save_pretrained(into)
        return {n: tensors.rows(x, 0, x.shape[0]) for n, x in tensors.folder(into).items()}

    weights = stored(model.model, folder)
    for k, (layer, around) in enumerate(zip(model.layers, model.around, strict=True)):
        place, behind = _place(name, k), ".layers.0" if CASES[name].names is QWEN else ""
        for n, x in stored(layer, folder.with_name(f"{folder.name}-{k}")).items():
            if n.startswith("model.layers.0."):
                weights[n.replace("model.layers.0", place + behind, 1)] = x
        weights |= {f"{place}.{CASES[name].names[n]}.weight": value(p) for n, p in around.items()}
        if repeat and CASES[name].names is DEEPSEEK:
            weights[f"{place}.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
            weights[f"{place}.shared_head.head.weight"] = weights.get("lm_head.weight", weights[mtp.EMBEDDING]).clone()
    config = json.loads((folder / "config.json").read_text())
    for key in ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers"):
        config.pop(key, None)
    key = "mtp_num_hidden_layers" if name.startswith("qwen3_5") else "num_nextn_predict_layers"
    (folder / "config.json").write_text(json.dumps(config | {key: CASES[name].modules}))
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    return folder


def documents() -> list[Tensor]:
    return list(TOKENS.split(LENGTHS))


def defined(name: str, model: Theirs) -> list[Tensor]:
    """The mean loss of the next token and of each module, by the published definition, a document at a time: a norm of
    the embedding of the token ahead, one of the stream that came before, both through a matrix, a layer, a norm, the
    head."""
    about, losses = CASES[name].about, [list[Tensor]() for _ in range(1 + len(model.layers))]

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + model.model.config.rms_norm_eps).sqrt() * (about + weight)

    for tokens in documents():
        hidden = model.model.model(tokens[None], use_cache=False).last_hidden_state
        if len(tokens) > 1:
            losses[0].append(F.cross_entropy(model.model.lm_head(hidden)[0, :-1], tokens[1:], reduction="none"))
        for k, (layer, around) in enumerate(zip(model.layers, model.around, strict=True), 1):
            left = len(tokens) - k
            if left < 1:
                break
            embedded = normed(model.model.model.embed_tokens(tokens[k:])[None], around["embedding_norm"])
            stream = normed(hidden[:, :left], around["hidden_norm"])
            joined = torch.cat((embedded, stream), -1) @ around["join"].T
            hidden = layer.model(inputs_embeds=joined, use_cache=False).last_hidden_state
            if left > 1:
                logits = model.model.lm_head(hidden)[0, : left - 1]
                losses[k].append(F.cross_entropy(logits, tokens[k + 1 :], reduction="none"))
    return [torch.cat(each).mean() for each in losses]


def ours_of(model: Any, modules: int) -> list[Tensor]:
    """The same of a model of ours, all documents in one row."""

    def shifted(k: int, missing: int) -> Tensor:
        return torch.cat([torch.cat((d[k:], d.new_full((min(k, len(d)),), missing))) for d in documents()])

    ahead = Ahead(
        *(
            torch.stack([shifted(k + more, m) for k in range(1, 1 + modules)])[:, None]
            for more, m in ((0, -1), (1, -100))
        )
    )
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    output = model(TOKENS[None], Whole.of(positions), shifted(1, -100)[None], ahead=ahead)
    asked = [max(0, n - k) for k in range(1, 2 + modules) for n in LENGTHS]
    counts = [sum(asked[i * len(LENGTHS) : (i + 1) * len(LENGTHS)]) for i in range(1 + modules)]
    return [x / count for x, count in zip((output.cross_entropy, *output.ahead), counts, strict=True)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "," in name else name for name in CASES]
)
def test_modules_are_their_published_definition(name, tmp_path):
    """Losses and every gradient, in packed documents; in and out again, the same numbers under the same names."""
    case, model = CASES[name], theirs(name)
    folder = publish(name, model, tmp_path / "folder")
    found = Published(folder)
    assert not found.left_out and found.model["mtp_layers"] == case.modules and found.unpublishable is None
    ours = loaded(found.model, folder)
    want, got = defined(name, model), ours_of(ours, case.modules)
    for one, other in zip(got, want, strict=True):
        close(one, other)
    (want[0] + 0.3 * sum(want[1:])).backward()
    (got[0] + 0.3 * sum(got[1:])).backward()
    shared = (model.model.model.embed_tokens.weight, model.model.lm_head.weight)
    told = Published(publish(name, model, tmp_path / "gradients", grad=True, repeat=False))
    assert any(p.grad is not None and p.grad.norm() > 0 for p in shared)
    least = 1e-7 * torch.stack([p.grad.norm() for p in ours.parameters()]).norm()
    for parameter, p in ours.named_parameters():
        read = told.read(parameter, 0, len(p)).double()
        zero, unit = (filled(told, parameter, value, len(p)) for value in (0.0, 1.0))
        want_of = (read - zero) / (unit - zero) ** 2
        rounded = 1e-7 * p.numel() ** 0.5 if case.about and "norm" in parameter else 0.0  # 1 + g in fp32
        assert want_of.norm() > 0 and (p.grad - want_of).norm() <= 1e-5 * want_of.norm() + least + rounded, parameter
    out = Saved(
        take(found, tmp_path / "run", {}, lambda each: None), {"model": found.model, "data": {"max_length": 77}}
    )
    assert not out.left_out
    give(out, tmp_path / "back", {}, config=NO_TOKENS)
    names = ARCHITECTURES[found.name].unstacked
    before, after = names(tensors.folder(folder)), names(tensors.folder(tmp_path / "back"))
    assert before.keys() == after.keys()
    for key, each in before.items():
        assert torch.equal(*(tensors.rows(x, 0, each.shape[0]) for x in (each, after[key]))), key
    again = Published(tmp_path / "back")
    assert again.model == {**found.model} and not again.left_out


@torch.no_grad()
def test_norms_that_change_places_are_seen(monkeypatch, tmp_path):
    model = theirs("deepseek_v3")
    folder = publish("deepseek_v3", model, tmp_path / "folder")
    honest = mtp.PublishedMTP.rows

    def swapped(self: Any, alone: Any, config: Any, k: int) -> Any:
        rows = honest(self, alone, config, k)
        one, other = "mtp.0.norm.weight", "mtp.0.hidden_norm.weight"
        return rows | {one: rows[other], other: rows[one]}

    monkeypatch.setattr(mtp.PublishedMTP, "rows", swapped)
    got = ours_of(loaded(Published(folder).model, folder), 1)
    with pytest.raises(AssertionError):
        close(got[1], defined("deepseek_v3", model)[1])


def changed(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def refused(capsys: Any, *arguments: Any) -> str:
    """The last line of a command that is refused and has written nothing."""
    assert main([*map(str, arguments)]) == 2 and not Path("runs", "again").exists() and not Path("again").exists()
    return str(capsys.readouterr().err.splitlines()[-1])


def test_a_user_takes_modules_in_or_leaves_them_out(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = publish("deepseek_v3", theirs("deepseek_v3"), tmp_path / "folder")
    for arguments, modules in (("with",), 1), (("without", "mtp=false"), 0):
        assert main(["import", "folder", *arguments]) == 0
        said = capsys.readouterr().err
        assert ("left out: model.layers.2." in said) == (modules == 0)
        assert main(["export", arguments[0], f"{arguments[0]}-back"]) == 0
        assert "left out" not in capsys.readouterr().err
        back = json.loads((tmp_path / f"{arguments[0]}-back" / "config.json").read_text())
        assert back["num_nextn_predict_layers"] == modules
    before, after = (tensors.folder(tmp_path / name) for name in ("folder", "with-back"))
    assert ARCHITECTURES["DeepseekV3ForCausalLM"].unstacked(before).keys() == after.keys()
    assert main(["import", "--list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["DeepseekV3ForCausalLM"].endswith("; MTP modules in and out")
    assert lines["Qwen3NextForCausalLM"].endswith("; its MTP module in and out")
    assert lines["NemotronHForCausalLM"].endswith("; MTP left out") and "MTP" not in lines["LlamaForCausalLM"]
    changed(folder, num_nextn_predict_layers=2)
    assert refused(capsys, "import", "folder", "again") == (
        "farspan import: SOURCE=folder: config.json: num_nextn_predict_layers=2: must be 1 for the MTP modules at "
        "model.layers.2; `farspan import` with mtp=false leaves them out"
    )
    changed(folder, num_nextn_predict_layers=None)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.layers.2.embed_tokens.weight"][5, 0] += 1
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    assert refused(capsys, "import", "folder", "again").endswith(
        "model.layers.2.embed_tokens.weight: must hold the numbers of model.embed_tokens.weight, as here"
    )
    assert main(["import", "folder", "left", "mtp=false"]) == 0
    del weights["model.layers.2.hnorm.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    assert "model.layers.2.hnorm.weight [32]: missing from folder" in refused(capsys, "import", "folder", "again")


def test_modules_that_a_family_has_not_are_named(tmp_path):
    folder = publish("qwen3_5", theirs("qwen3_5"), tmp_path / "folder")
    found = Published(folder)
    step = take(found, tmp_path / "run", {}, lambda each: None)
    for change, line in (
        ({"mtp_block": "gdn_dense"}, "model.pattern=.gdn_dense.: must have a layer of attention"),
        ({"mtp_layers": 2}, "model.mtp_layers=2: must be at most 1, as in Qwen3_5ForCausalLM"),
        ({"tied": True, "tied_scale": None}, "model.tied_scale=null: must be 1 with modules of Qwen3_5ForCausalLM"),
    ):
        saved = Saved(step, {"model": {**found.model, **change}, "data": {}})
        assert saved.left_out and re.match(line, saved.why), saved.why
    changed(folder, mtp_use_dedicated_embeddings=True)
    with pytest.raises(
        ValueError, match="mtp_use_dedicated_embeddings=true: must be false for the MTP modules at mtp;"
    ):
        Published(folder)
    assert Published(folder, mtp=False).left_out
