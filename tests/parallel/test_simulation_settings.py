"""A cluster, a model and lengths from a configuration: what is accepted, and what is refused in one line."""

import numpy as np
import pytest

from parallel.schedule.adaptive.settings import SimulationSettings, read_lengths


def test_batches_are_in_order_and_what_is_left_out_is_counted(tmp_path):
    file = tmp_path / "lengths.npy"
    np.save(file, np.array([5, 900, 7, 3, 2, 901, 4, 999], dtype=np.uint32))
    settings = SimulationSettings(lengths=str(file), sequences=2, longest=10)
    assert settings.batches(2) == ([[5, 7], [3, 2]], 1)
    assert SimulationSettings(lengths=str(file), sequences=4).batches(2) == ([[5, 900, 7, 3], [2, 901, 4, 999]], 0)
    with pytest.raises(ValueError, match=r"has 5 sequences of at most 10 tokens; scheduler.simulate=3 .* need 6"):
        settings.batches(3)
    (tmp_path / "lengths.txt").write_text("5 900\n7\n")
    assert read_lengths(tmp_path / "lengths.txt").tolist() == [5, 900, 7]


@pytest.mark.parametrize(
    "content",
    [b"", b"1 two 3", b"0 4", b"-1", b"1.5", b"\x93NUMPY", b"\xff\xfe", b"9" * 5000],
    ids=["empty", "words", "zero", "negative", "fraction", "torn", "bytes", "digits"],
)
@pytest.mark.parametrize("suffix", ["npy", "txt"])
def test_a_file_that_holds_no_lengths_is_one_line(tmp_path, content, suffix):
    file = tmp_path / f"lengths.{suffix}"
    file.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_lengths(file)
    assert str(error.value).startswith(f"simulation.lengths={file}: must") and "\n" not in str(error.value)


def test_arrays_of_objects_and_fractions_are_refused_and_nothing_is_unpickled(tmp_path):
    for i, array in enumerate([np.array([object()]), np.array([1.5]), np.array([[1, 2]])]):
        np.save(tmp_path / f"{i}.npy", array, allow_pickle=True)
        with pytest.raises(ValueError, match="must be a .npy array of one dimension, or text, of whole numbers"):
            read_lengths(tmp_path / f"{i}.npy")
    with pytest.raises(ValueError, match="cannot be read"):
        read_lengths(tmp_path / "none.npy")
    with pytest.raises(ValueError, match="cannot be read"):
        read_lengths(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"model": "8b"},
        {"states": "relay"},
        {"sequences": 0},
        {"machines": -1},
        {"memory": 0.0},
        {"memory": float("nan")},
        {"rate": float("inf")},
        {"latency": -1.0},
        {"linear": 0, "softmax": 0},
        {"inside": 100.0},
        {"machines": 2**20},
        {"speeds": [1.0]},
        {"speeds": [0.0] * 64},
        {"schedulers": ["fastest"]},
        {"schedulers": []},
    ],
    ids=str,
)
def test_wrong_values_name_their_key(values):
    with pytest.raises(ValueError, match=f"^simulation.{next(iter(values))}"):
        SimulationSettings(**values)


def test_clusters_and_models():
    published = SimulationSettings(model="7b")
    assert published.cluster().ranks == 64 and published.published().name == "7b 192K"
    assert SimulationSettings(model="7b", longest=383_872).published().name == "7b 384K"
    mixed = SimulationSettings(model="13b", linear=3, softmax=1).published()
    assert [layer.count for layer in mixed.layers] == [10, 30]
    own = SimulationSettings(machines=3, per_machine=4, inside=100.0, across=10.0, latency=5.0, speeds=[0.5] * 12)
    cluster = own.cluster()
    assert cluster.ranks == 12 and cluster.wire(4) == (100e9, 5e-6) and cluster.wire(8) == (10e9, 5e-6)
    assert cluster.speeds == (0.5,) * 12
