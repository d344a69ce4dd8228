"""The tokens around a text: each has a role of its own, read from a folder, and a document holds what its model has
read."""

import hashlib
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data.hf_tokenizer import card_of, files, from_file, ids_of, read
from data.loader import Data
from data.pack import NO_TARGET
from data.roles import Roles, roles_of
from data.tokenizer import Bytes, Json, Symbols, from_card

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

from tests.published_tokens import KINDS, TEXTS  # noqa: E402

LOOKS = "</s> or <|eot_id|><|im_end|>, <eos> and x<bos>y <｜end▁of▁sentence｜>"


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
    """(folder, what is expected of it) of a kind of published tokenizer."""
    expected = KINDS[request.param](tmp_path / "folder")
    config = {"model_type": "qwen3" if request.param == "qwen3" else "llama", **expected["ids"]}
    (tmp_path / "folder/config.json").write_text(json.dumps(config))
    return tmp_path / "folder", expected


def test_a_folder_says_what_stands_around_a_text(kind) -> None:
    folder, expected = kind
    found = read(folder)
    assert {key: getattr(found.roles, key) for key in ("begin", "end", "stop", "pad")} == {
        key: value for key, value in expected.items() if key != "ids"
    }
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = found.encode(text.encode()).tolist()
        assert [*found.roles.begin, *ids] == theirs(text)["input_ids"], text
        assert found.decode(ids) == text.encode()
        write = found.writer(ids[:1])
        assert found.decode(ids[:1]) + b"".join(map(write, ids[1:])) == text.encode()
    assert found.size == len(theirs)


def test_text_that_looks_like_a_special_token_stays_text(kind) -> None:
    found = read(kind[0])
    special = found.roles.marks | {*found.roles.stop} | {i for i in found.added if found.unknown_id != i}
    for text in (LOOKS, *LOOKS.split()):
        assert not special & set(found.encode(text.encode()).tolist()), text


def test_a_card_has_it_again(kind) -> None:
    found = read(kind[0])
    card = json.loads(json.dumps(found.card()))
    again = from_card(card)
    assert again.card() == found.card() == card_of(kind[0]) and again.roles == found.roles
    assert again.identity == found.identity == pickle.loads(pickle.dumps(found)).identity
    (kind[0] / "tokenizer.json").write_text(json.dumps(card))  # as a run has it
    assert from_file(kind[0]).card() == card


def test_files_are_written_back_as_they_came(kind, tmp_path) -> None:
    folder, expected = kind
    card = card_of(folder)
    written = files(card, 64)
    came = {path.name: path.read_text() for path in folder.iterdir() if path.name != "config.json"}
    assert written == came and ids_of(card) == expected["ids"]
    assert files(card, 1 << 40)["tokenizer.json"] == came["tokenizer.json"]


def test_a_map_of_special_tokens_and_ids_of_configurations_name_what_the_tokenizer_does_not(tmp_path) -> None:
    folder = tmp_path / "folder"
    KINDS["deepseek"](folder)
    name = json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]
    (folder / "tokenizer_config.json").unlink()
    (folder / "generation_config.json").unlink()
    end = read(folder)._backend.token_to_id(name["content"])
    assert read(folder).roles.end is None  # a token that no list has, and nothing that names it
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": name}))
    assert read(folder).roles.end == end
    (folder / "special_tokens_map.json").unlink()
    for config in ("config.json", "generation_config.json"):
        (folder / config).write_text(json.dumps({"eos_token_id": [end]}))
        assert (read(folder).roles.end, read(folder).roles.stop) == (end, (end,))
        (folder / config).unlink()


@pytest.mark.parametrize("template", ["their own", "none", "both"])
@pytest.mark.parametrize("add", [None, False, True])
def test_a_prompt_has_what_the_folders_own_tokenizer_puts_there(tmp_path, template, add) -> None:
    """Its template, where it has one, whatever its settings say of it."""
    from tokenizers.processors import TemplateProcessing

    folder = tmp_path / "folder"
    KINDS["llama2"](folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    if template == "none":
        backend = tokenizers.Tokenizer.from_str(json.dumps({**json.loads(backend.to_str()), "post_processor": None}))
    if template == "both":
        backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    (folder / "tokenizer.json").write_text(backend.to_str())
    file = folder / "tokenizer_config.json"
    settings = {key: each for key, each in json.loads(file.read_text()).items() if not key.startswith("add_")}
    settings |= {} if add is None else {"add_bos_token": add, "add_eos_token": add}
    file.write_text(json.dumps(settings))
    found = read(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)("the text")["input_ids"]
    behind = [2] if template == "both" else []
    assert [*found.roles.begin, *found.encode(b"the text").tolist(), *behind] == theirs
    assert found.roles.end == 2


def test_a_named_token_closes_documents_and_ends_texts(tmp_path) -> None:
    folder = tmp_path / "folder"
    KINDS["qwen3"](folder)
    found = from_file(folder, "<|endoftext|>")
    end = found._backend.token_to_id("<|endoftext|>")
    assert (found.roles.begin, found.roles.end) == ((), end) and end in found.roles.stop
    assert from_card(found.card()).card() == found.card() == card_of(folder, "<|endoftext|>")
    with pytest.raises(ValueError, match=r"has no token <other>; it has <\|endoftext\|>"):
        from_file(folder, "<other>")


def test_tokens_of_our_own_keep_one_for_everything() -> None:
    assert Bytes().roles == roles_of(SimpleNamespace(DOCUMENT=256)) == Roles((256,), 256, (256,))
    assert Bytes().card() == {"name": "bytes", "size": 257, "special": {"document": 256}}
    roles = Symbols(5).roles
    assert roles.joint and roles.closing == () and roles.marks == {0} and roles.fill == 0 and roles.entry == (0,)


def test_a_word_is_no_end_of_a_text(tmp_path) -> None:
    """Classes of configurations have 2 where nothing is said, whatever the tokenizer calls 2."""
    words = {f"t{i}": i for i in range(9)} | {"<|endoftext|>": 9}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
    (tmp_path / "tokenizer.json").write_text(backend.to_str())
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    card = card_of(tmp_path)
    assert card["special"]["end"] == 9 and card["special"]["stop"] == [9]
    assert ids_of(card) == {"bos_token_id": 1, "eos_token_id": 9}


def store_of(folder: Path, tmp_path: Path, packing: str = "concat"):
    texts = tmp_path / "texts"
    texts.mkdir(exist_ok=True)
    for i, text in enumerate([*TEXTS * 6]):
        (texts / f"{i}.txt").write_text(f"{text} {i}" * (1 + i % 3))
    sizes = {"max_length": 32, "heldout": 0.2, "heldout_tokens": 64, "packing": packing, "min_length": 8}
    data = Data(corpus="text", path=str(texts), tokenizer=str(folder), store=str(tmp_path / "store"), **sizes)
    return data.open(128)


@pytest.mark.parametrize("name, packing", [("llama2", "concat"), ("llama3", "decomposition"), ("qwen3", "best_fit")])
def test_documents_hold_what_their_model_has_read(tmp_path, name, packing) -> None:
    """Begin, text, end; the end is a target, and nothing predicts a document's first token from another document."""
    KINDS[name](tmp_path / "folder")
    batches = store_of(tmp_path / "folder", tmp_path, packing)
    store, roles = batches.sources[0].store, batches.tokenizer.roles
    assert not store.opened and store.card["special"] == roles.card()
    known = set()
    for i in range(len(store)):
        document = store.document(i).tolist()
        begin, text = document[: len(roles.begin)], document[len(roles.begin) : -1]
        assert tuple(begin) == roles.begin and document[-1] == roles.end and not roles.marks & set(text)
        content = (tmp_path / "texts" / store.source(i)).read_bytes()
        assert batches.tokenizer.decode(document) == content or batches.tokenizer.roles.unknown in document
        known |= {(a, b) for a, b in zip(document, document[1:], strict=False)}
    ends = 0
    for packed in [*batches.batch(0, 0), *batches.batch(0, 1), *batches.heldout()]:
        asked = packed.targets != NO_TARGET
        assert set(zip(packed.tokens[asked].tolist(), packed.targets[asked].tolist(), strict=True)) <= known
        assert not (packed.targets[packed.tokens == roles.end] != NO_TARGET).any()
        ends += int((packed.targets == roles.end).sum())
    assert ends


def words(model: str) -> tuple[str, list[str]]:
    """(a tokenizer.json that is no byte-level BPE, texts that it spells without loss)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = ["arguments found here", "found arguments", "x", "here and here and there", "[SEP] x"]
    kinds = {
        "wordpiece": lambda: models.WordPiece(unk_token="[UNK]"),
        "ends": lambda: models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"),
        "words": lambda: models.WordLevel(unk_token="[UNK]"),
    }
    backend = Tokenizer(kinds[model]())
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    given = {"special_tokens": ["[UNK]", "[SEP]"], "show_progress": False}
    if model == "wordpiece":
        backend.decoder = decoders.WordPiece(cleanup=False)
        trainer = trainers.WordPieceTrainer(vocab_size=60, initial_alphabet=list("[SEP]"), **given)
    elif model == "ends":
        backend.decoder = decoders.BPEDecoder("</w>")
        trainer = trainers.BpeTrainer(vocab_size=70, end_of_word_suffix="</w>", initial_alphabet=list("[SEP]"), **given)
    else:
        trainer = trainers.WordLevelTrainer(**given)
    backend.train_from_iterator([*texts[:-1] * 3, *([] if model == "words" else ["[SEPx SEP] [[SEP]]"])], trainer)
    return backend.to_str(), texts[:-1] if model == "words" else texts


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("model", ["wordpiece", "ends", "words"])
def test_words_are_spelled_with_the_blanks_between_them(model, bare) -> None:
    text, texts = words(model)
    if bare:
        text = json.dumps({**json.loads(text), "decoder": None})
    found = Json(text)
    for each in texts:
        ids = found.encode(each.encode())
        assert found.decode(ids) == each.encode(), each
        for cut in range(1, len(ids)):
            write = found.writer(ids[:cut].tolist())
            said = found.decode(ids[:cut]) + b"".join(write(int(i)) for i in ids[cut:])
            assert said == each.encode(), (each, cut)


def test_tokens_that_stand_for_unknown_text_are_counted(tmp_path) -> None:
    text, _ = words("wordpiece")
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"found {'ж ' * (i % 2)}here {i % 3 * 'x'}")
    sizes = {"max_length": 4, "heldout": 0.3, "heldout_tokens": 4, "packing": "concat"}
    data = Data(
        corpus="text", path=str(tmp_path / "texts"), tokenizer=str(tmp_path), store=str(tmp_path / "s"), **sizes
    )
    store = data.open(16).sources[0].store
    unknown = store.tokenizer.unknown_id
    assert store.card["unknown"] == int(np.count_nonzero(store.tokens == unknown)) == 10


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "Qwen2Tokenizer", "RobertaTokenizer"])
@pytest.mark.parametrize("add", [False, True])
def test_a_vocabulary_and_its_merges_are_a_tokenizer(tmp_path, kind, add) -> None:
    """Of folders that are older than tokenizer.json, as transformers reads them."""
    folder = tmp_path / "folder"
    folder.mkdir()
    KINDS["qwen3"](tmp_path / "made")
    model = json.loads((tmp_path / "made/tokenizer.json").read_text())["model"]
    names = {"GPT2Tokenizer": ["<|endoftext|>"], "Qwen2Tokenizer": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]}
    added = names.get(kind, ["<s>", "</s>", "<unk>", "<pad>", "<mask>"])
    vocabulary = {**model["vocab"], **{name: len(model["vocab"]) + i for i, name in enumerate(added)}}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]))
    end = added[-1] if kind == "Qwen2Tokenizer" else added[1 % len(added)]
    settings = {"tokenizer_class": kind, "eos_token": end, "bos_token": added[0]}
    settings |= {"pad_token": None if kind == "GPT2Tokenizer" else added[0], "unk_token": end}
    settings |= {"add_bos_token": True} if add and kind == "GPT2Tokenizer" else {}
    if kind != "RobertaTokenizer":
        settings["added_tokens_decoder"] = {
            str(vocabulary[name]): {"content": name, "special": True, "normalized": False} for name in added
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    found, theirs = from_file(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert found.roles.end == vocabulary[end] and card_of(folder) == found.card()
    for text in TEXTS:
        ids = [*found.roles.begin, *found.encode(text.encode()).tolist()]
        own = theirs(text)["input_ids"]
        assert ids == own[: len(ids)] and set(own[len(ids) :]) <= {found.roles.end}, text
        assert found.decode(ids) == text.encode()
    assert not found.roles.marks & set(found.encode(f"a{end} {added[0]}".encode()).tolist())


def test_a_vocabulary_whose_text_is_cut_another_way_is_refused(tmp_path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    with pytest.raises(ValueError, match="CLIPTokenizer cannot be made of vocab.json: must be one of GPT2Tokenizer"):
        from_file(tmp_path)


def test_a_store_of_theirs_is_held_against_its_checksums(tmp_path) -> None:
    from data.stores.checks import verify

    KINDS["qwen3"](tmp_path / "folder")
    store = store_of(tmp_path / "folder", tmp_path).sources[0].store
    read_, parts = verify(store)
    assert read_ == parts > 0


def test_a_run_that_is_older_keeps_the_tokens_that_it_has_read(tmp_path) -> None:
    """Its files say more of the tokens around a text now than it has known."""
    from launch.preflight.init_from import own_tokens

    KINDS["llama2"](tmp_path / "folder")
    run, text = tmp_path / "run", (tmp_path / "folder/tokenizer.json").read_text()
    run.mkdir()
    config = {"data": {"corpus": "text", "tokenizer": str(tmp_path / "folder")}}
    mixed = {"data": {"sources": {"a": config, "b": {"data": {"corpus": "store", "tokenizer": "bytes"}}}}}
    (run / "tokenizer.json").write_text(json.dumps(read(tmp_path / "folder").card()))
    assert own_tokens(json.loads(json.dumps(config)), run) == config
    old = {"name": "json", "size": read(tmp_path / "folder").size, "special": {"document": 2}, "document": "</s>"}
    (run / "tokenizer.json").write_text(json.dumps({**old, "json": text}))
    own = str(run / "tokenizer.json")
    assert own_tokens(json.loads(json.dumps(config)), run)["data"]["tokenizer"] == own
    sources = own_tokens(json.loads(json.dumps(mixed)), run)["data"]["sources"]
    assert [sources[name]["data"]["tokenizer"] for name in "ab"] == [own, "bytes"]
    found = from_file(own)
    assert found.roles == Roles.of(2) and found.card() == {**old, "json": text}
    assert found.identity == f"json-{hashlib.sha256(f'</s> {text}'.encode()).hexdigest()[:16]}"  # of its store's card


@pytest.mark.parametrize(
    "name, told, line",
    [
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": ["x"]},
            "tokenizer_config.json: added_tokens_decoder must be",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": "y"}}, "added_tokens_decoder must be"),
        ("tokenizer_config.json", ["x"], "tokenizer_config.json is not a JSON object"),
        ("generation_config.json", "{", "generation_config.json is not JSON"),
        ("config.json", {"text_config": "x", "eos_token_id": "x"}, None),
        ("tokenizer_config.json", {"eos_token": 5, "add_bos_token": "x", "bos_token": {"content": []}}, None),
        ("generation_config.json", {"eos_token_id": [True, None, -1], "pad_token_id": 1.5}, None),
    ],
)
def test_a_damaged_folder_costs_one_line(tmp_path, name, told, line) -> None:
    KINDS["qwen3"](tmp_path)
    (tmp_path / name).write_text(told if isinstance(told, str) else json.dumps(told))
    if line is None:
        assert from_card(card := card_of(tmp_path)).card() == card and read(tmp_path).roles.end is not None
        return
    with pytest.raises(ValueError, match=line) as error:
        card_of(tmp_path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_json_is_no_tokenizer(tmp_path) -> None:
    (tmp_path / "x.md").write_text("# Read me")
    with pytest.raises(ValueError, match="^is no tokenizer.json"):
        from_file(tmp_path / "x.md")
