"""A checkpoint from elsewhere: it runs nothing, reads nothing outside of its folder, and what is wrong is one line."""

import io
import json
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from tests.watched import WATCHED
from train.checkpoints import checkpoint, stored
from train.checkpoints.inert import parsed
from train.checkpoints.stored import DamagedError

WEIGHTS = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.arange(4, dtype=torch.bfloat16),
    "c": torch.arange(12, dtype=torch.float64).view(3, 4).t(),
    "scalar": torch.tensor(3),
}
FACTS = {"step": 1, "tokens": 6, "skips": 0, "attempt": 1}


def saved(folder: Path) -> Path:
    """A checkpoint of `WEIGHTS`, as torch writes it."""
    path = folder / "step-1"
    path.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": dict(WEIGHTS)}, checkpoint_id=str(path), no_dist=True)
    sealed(path)
    return path


def sealed(path: Path, **change) -> None:
    """With a manifest whose checksums are right, whatever the files hold."""
    (path / checkpoint.MANIFEST).unlink(missing_ok=True)
    model = {name: [list(x.shape), str(x.dtype).removeprefix("torch.")] for name, x in WEIGHTS.items()}
    checkpoint.seal(path, {**FACTS, "model": model, **change})


def loaded(path: Path) -> dict[str, torch.Tensor]:
    """As a run does it: verified, then read into tensors of its own."""
    checkpoint.verify(path)
    into = {name: torch.full_like(x, 9) for name, x in WEIGHTS.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.read({"model": into}, path, alone=True)
    return into


def refused(path: Path) -> str:
    """The line that both the check before a start and the reader itself refuse a checkpoint with."""
    with pytest.raises(DamagedError) as error:
        loaded(path)
    line = str(error.value)
    assert line and "\n" not in line and len(line) < 600
    return line


def metadata(path: Path):
    return pickle.loads((path / ".metadata").read_bytes())  # our own, in a test


def rewritten(path: Path, found) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(found))
    sealed(path)


class Planted:
    """Runs a command when it is unpickled, and is then the tensor that is looked for."""

    def __init__(self, ran: Path, value: torch.Tensor):
        self.ran, self.value = ran, value

    def __reduce__(self):
        return eval, (f"(open({str(self.ran)!r}, 'w').close(), __import__('torch').ones({list(self.value.shape)}))[1]",)


def test_what_torch_has_saved_is_read_bit_for_bit(tmp_path: Path) -> None:
    found = loaded(saved(tmp_path))
    for name, value in WEIGHTS.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype, name


def test_an_entry_of_bytes_that_is_a_tensor_of_the_right_shape_runs_nothing(tmp_path: Path) -> None:
    path, ran = saved(tmp_path), tmp_path / "ran"
    found, content = metadata(path), io.BytesIO()
    torch.save(Planted(ran, WEIGHTS["a"]), content)
    file = path / "__0_0.distcp"
    place = found.storage_data[MetadataIndex("model.a", [0, 0])]
    found.storage_data[MetadataIndex("model.a")] = type(place)(file.name, file.stat().st_size, len(content.getvalue()))
    file.write_bytes(file.read_bytes() + content.getvalue())
    found.state_dict_metadata["model.a"] = BytesStorageMetadata()
    rewritten(path, found)
    with warnings.catch_warnings():  # torch's own reader does run it, so the plant is one
        warnings.simplefilter("ignore")
        into = {"a": torch.zeros(2, 3)}
        dcp.load({"model": into}, checkpoint_id=str(path), no_dist=True)
    assert ran.exists()
    ran.unlink()
    assert refused(path) == "it has no tensor model.a"
    with pytest.raises(DamagedError, match="it has no tensor model.a"):
        checkpoint.read({"model": {"a": torch.zeros(2, 3)}}, path, alone=True)
    with pytest.raises(DamagedError, match="never loaded"):
        stored.TensorLoadPlanner().load_bytes(type("Item", (), {"dest_index": MetadataIndex("model.a")}), content)
    assert not ran.exists()


@pytest.mark.parametrize("where", ["metadata", "piece"])
def test_no_pickle_is_run(tmp_path: Path, where: str) -> None:
    path, ran = saved(tmp_path), tmp_path / "ran"
    evil = pickle.dumps(Planted(ran, WEIGHTS["a"]), protocol=2)
    if where == "metadata":
        (path / ".metadata").write_bytes(evil)
    else:
        repacked(path, lambda name, content: evil if name.endswith("data.pkl") else content)
    sealed(path)
    assert "which no checkpoint needs" in refused(path)
    assert not ran.exists()


def repacked(path: Path, change, compression: int = zipfile.ZIP_STORED) -> None:
    """Writes the piece of `a` again, each member as `change` has it."""
    found, file = metadata(path), path / "__0_0.distcp"
    place = found.storage_data[MetadataIndex("model.a", [0, 0])]
    with zipfile.ZipFile(io.BytesIO(file.read_bytes()[place.offset : place.offset + place.length])) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    again = io.BytesIO()
    with zipfile.ZipFile(again, "w", compression) as archive:
        for name, content in members.items():
            if (new := change(name, content)) is not None:
                archive.writestr(name, new)
    place.offset, place.length = file.stat().st_size, len(again.getvalue())
    file.write_bytes(file.read_bytes() + again.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(found))


def edited(old: bytes, new: bytes):
    def change(name: str, content: bytes) -> bytes:
        assert not name.endswith("data.pkl") or old in content
        return content.replace(old, new) if name.endswith("data.pkl") else content

    return change


PIECES = {
    "lies about its dtype": (edited(b"FloatStorage", b"IntStorage"), "it is torch.int32"),
    "names another file": (edited(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x00/"), "not whole"),
    "has another shape": (edited(b"K\x02K\x03", b"K\x01K\x03"), "it is torch.float32 [1, 3]"),
    "has steps beyond its end": (edited(b"K\x03K\x01", b"K\xffK\x01"), "reaches beyond"),
    "has fewer bytes": (lambda name, content: content[:-4] if name.endswith("/data/0") else content, "not as many"),
    "has none": (lambda name, content: None if name.endswith("/data/0") else content, "no item named"),
    "has no pickle": (lambda name, content: None if name.endswith("data.pkl") else content, "cannot be read"),
    "is of other machines": (lambda name, content: b"big" if name.endswith("byteorder") else content, "order"),
}


@pytest.mark.parametrize("name", PIECES)
def test_a_piece_that_is_no_such_tensor(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path)
    change, words = PIECES[name]
    repacked(path, change)
    sealed(path)
    line = refused(path)
    assert words in line and "__0_0.distcp: model.a" in line


def test_a_piece_that_would_unpack_to_more_than_it_is(tmp_path: Path) -> None:
    path = saved(tmp_path)
    repacked(path, lambda name, content: content, zipfile.ZIP_DEFLATED)
    sealed(path)
    assert "is compressed" in refused(path)


def place_of(found):
    return found.storage_data[MetadataIndex("model.a", [0, 0])]


def leads_up(path, found):
    (path.parent / "secret").write_bytes(b"x" * 5000)
    place_of(found).relative_path = "../secret"


def leads_away(path, found):
    place_of(found).relative_path = "/etc/passwd"


def is_a_link(path, found):
    (path.parent / "secret").write_bytes(b"x" * 5000)
    (path / "__1_0.distcp").symlink_to(path.parent / "secret")
    place_of(found).relative_path = "__1_0.distcp"


def is_a_pipe(path, found):
    os.mkfifo(path / "__1_0.distcp")
    place_of(found).relative_path = "__1_0.distcp"


def ends_beyond(path, found):
    place_of(found).length = 1 << 40


def begins_before(path, found):
    place_of(found).offset = -5


def is_text(path, found):
    place_of(found).offset = "0"


def has_gaps(path, found):
    chunk = found.state_dict_metadata["model.a"].chunks[0]
    chunk.sizes = torch.Size([1, 3])


def lies_twice(path, found):
    entry = found.state_dict_metadata["model.a"]
    entry.chunks = [entry.chunks[0], entry.chunks[0]]
    entry.chunks[0].sizes = torch.Size([1, 3])


def has_other_sizes(path, found):
    found.state_dict_metadata["model.a"].size = torch.Size([3, 2])


def has_a_dtype_of_text(path, found):
    found.state_dict_metadata["model.a"].properties.dtype = "float32"


def has_no_pieces(path, found):
    found.state_dict_metadata["model.a"].chunks = None


def has_no_places(path, found):
    found.storage_data = None


def is_enormous(path, found):
    found.state_dict_metadata["model.a"].size = torch.Size([1 << 62])


LIES = (leads_up, leads_away, is_a_link, is_a_pipe, ends_beyond, begins_before, is_text, has_gaps, lies_twice)
LIES += (has_other_sizes, has_a_dtype_of_text, has_no_pieces, has_no_places, is_enormous)


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_metadata_that_lies(tmp_path: Path, lie) -> None:
    path = saved(tmp_path)
    found = metadata(path)
    lie(path, found)
    (path / ".metadata").write_bytes(pickle.dumps(found))
    made = path / "__1_0.distcp"
    odd = made if made.is_symlink() or made.is_fifo() else None
    if odd:
        odd.rename(path.parent / "odd")
    sealed(path)
    if odd:
        (path.parent / "odd").rename(odd)
    assert ".metadata" in refused(path)


NONE = {
    "empty": b"",
    "cut": b"\x80",
    "stop": b".",
    "none": b"N.",
    "list": pickle.dumps([]),
    "dict": pickle.dumps({"a": 1}),
    "text": pickle.dumps("x" * 100),
    "itself": b"\x80\x04]\x94h\x00a.",
    "marks": b"(" * 100_000 + b"t" * 100_000 + b".",
    "deep": b"K\x01" + b"\x85" * 200_000 + b".",
    "memo": b"r\xff\xff\xff\xff.",
    "long": b"\x8e" + b"\xff" * 8,
}


@pytest.mark.parametrize("content", NONE.values(), ids=NONE)
def test_metadata_that_is_none(tmp_path: Path, content: bytes) -> None:
    path = saved(tmp_path)
    (path / ".metadata").write_bytes(content)
    sealed(path)
    assert ".metadata" in refused(path)


MANIFESTS = {
    "list": [],
    "null": None,
    "number": 1,
    "no files": {"files": None},
    "empty files": {"files": {}},
    "files of text": {"files": {"a": "b"}},
    "device": {"files": {"/dev/zero": [0, 0]}},
    "above": {"files": {"../step-1/.metadata": [1, 1]}},
    "folder": {"files": {"..": [0, 0]}},
    "nul": {"files": {"a\0b": [0, 0]}},
    "no model": {"model": []},
    "model of text": {"model": {"a": "b"}},
    "shape of text": {"model": {"a": [["2", 3], "float32"]}},
    "odd dtype": {"model": {"a": [[2, 3], "__class__"]}},
    "step of text": {"step": "1"},
    "no step": {"step": None},
    "negative": {"tokens": -1},
    "skipped": {"skipped": [[1]]},
    "guard": {"guard": {"seen": [[1.0], "x"]}},
    "average": {"average": {"kind": "ema"}},
    "order": {"order": []},
    "scale": {"scale": "1"},
    "format": {"format": [1]},
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_says_what_cannot_be(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path)
    file = path / checkpoint.MANIFEST
    change = MANIFESTS[name]
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({**whole, **change} if isinstance(change, dict) else change))
    refused(path)


@pytest.mark.parametrize("name", [checkpoint.MANIFEST, ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link"])
def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, name: str, kind: str) -> None:
    path = saved(tmp_path)
    (path / name).unlink()
    if kind == "pipe":
        os.mkfifo(path / name)
    elif kind == "folder":
        (path / name).mkdir()
    else:
        (path / name).symlink_to("/dev/zero" if kind == "device" else tmp_path / "nowhere")
    refused(path)


def test_json_nested_without_end_and_numbers_without_end(tmp_path: Path) -> None:
    path = saved(tmp_path)
    for text in (
        "[" * 100_000,
        '{"step": ' + "9" * 10_000 + "}",
        '{"a":' * 50_000,
        "\ud800".encode(errors="surrogatepass"),
    ):
        (path / checkpoint.MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())
        refused(path)


@settings(max_examples=60, deadline=10_000, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_file_with_any_bytes_changed_is_read_or_refused_in_one_line(tmp_path_factory, data) -> None:
    """With the checksums set right, as someone from elsewhere would."""
    path = saved(tmp_path_factory.mktemp("fuzz"))
    file = path / data.draw(st.sampled_from([".metadata", "__0_0.distcp", checkpoint.MANIFEST]))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 1 << 20)) % (len(content) + 1)
        width = data.draw(st.sampled_from([0, 1, 1, 1, 4, 50]))
        content[at : at + width] = data.draw(st.binary(max_size=8))
    file.write_bytes(content)
    if file.name != checkpoint.MANIFEST:
        sealed(path)
    WATCHED.on, WATCHED.seen = True, []
    try:
        loaded(path)
    except DamagedError as error:
        assert "\n" not in str(error)
    finally:
        WATCHED.on = False
    assert not WATCHED.seen
    assert sorted(p.name for p in path.iterdir()) == [".metadata", "__0_0.distcp", "manifest.json"]


@settings(max_examples=300, deadline=10_000)
@given(st.binary(max_size=60))
def test_a_pickle_of_any_bytes_is_data_or_refused(content: bytes) -> None:
    try:
        parsed(content)
    except ValueError as error:
        assert "\n" not in str(error)
