"""Pictures, measured: labels do not overlap, colours go over the data and say so, numbers are explained."""

import itertools

import pytest

from launch.evaluation import report
from launch.sweep.plot import _apart

LENGTHS = [512 << i for i in range(16)]
DEPTHS = [i / 19 for i in range(20)]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The figure of a part, as it would be saved."""
    figures = []
    monkeypatch.setattr(report, "save", lambda figure, path: figures.append(figure))

    def draw(results):
        report.draw(tmp_path, results)
        figures[-1].canvas.draw()
        return figures[-1]

    return draw


def _overlap(figure, texts):
    shown = [text for text in texts if text.get_text()]
    boxes = [text.get_window_extent(figure.canvas.get_renderer()) for text in shown]
    rotated = any(text.get_rotation() for text in shown)
    if rotated:  # at 30 degrees, a line's height apart is enough
        height = min(box.height for box in boxes)
        return any(abs(a.x1 - b.x1) < min(height, 10) for a, b in itertools.combinations(boxes, 2))
    return any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_needles_are_coloured_over_their_own_range(drawn):
    exact = [[0.1 + 0.01 * (i + d) for d in range(20)] for i in range(16)]
    nats = [[3.0 + i + d for d in range(20)] for i in range(16)]
    figure = drawn({"needle": {"lengths": LENGTHS, "depths": DEPTHS, "exact": exact, "logprob": nats}})
    left, right, *bars = figure.axes
    assert left.images[0].get_clim() == pytest.approx((0.1, 0.44)) and right.images[0].get_clim() == (3, 37)
    assert left.get_title("left").endswith("(10% to 44%)") and right.get_title("left").endswith("(3.0 to 37.0)")
    assert [[t.get_text() for t in bar.get_yticklabels()] for bar in bars] == [["10%", "44%"], ["3.0", "37.0"]]
    for axes in (left, right):
        assert not _overlap(figure, axes.get_xticklabels()) and not _overlap(figure, axes.get_yticklabels())


def test_needles_that_are_all_the_same_say_so(drawn):
    grid = [[0.0] * 3] * 2
    figure = drawn({"needle": {"lengths": [512, 1024], "depths": [0, 0.5, 1], "exact": grid, "logprob": grid}})
    assert figure.axes[0].get_title("left").endswith("(0% everywhere)")


def test_bars_say_what_their_numbers_count(drawn):
    rows = [{"from": 1 << i, "loss": 3.0, "documents": 3 * 10 ** (i % 7)} for i in range(24)]
    figure = drawn({"loss": {"lengths": rows}})
    (axes,) = figure.axes
    assert "on each bar: how many documents" in axes.get_title("left")
    assert not _overlap(figure, axes.texts) and not _overlap(figure, axes.get_xticklabels())
    assert [text.get_text() for text in axes.texts[:7]] == ["3", "30", "300", "3,000", "30k", "300k", "3M"]


def test_swept_values_that_are_close_have_one_label():
    assert _apart([1e-3, 1.05e-3, 1e-2], ["0.001", "0.00105", "0.01"], log=True) == {1e-3, 1e-2}
    assert _apart([1.0, 2.0, 3.0], ["1", "2", "3"], log=False) == {1.0, 2.0, 3.0}
