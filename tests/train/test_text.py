"""Text that grows token by token, however it is cut into tokens."""

import pytest

from train.inference.stop_strings import StreamedText


def shown(pieces, stop=()):
    """What each piece shows, the end's last, and whether it ended."""
    text, found = StreamedText(stop), []
    for piece in pieces:
        found.append(text.add(piece))
        if text.ended:
            break
    return [*found, text.close()], text.ended


def test_a_character_shows_when_its_last_byte_is_there():
    assert shown([b"a\xc3", b"\xa9", "€".encode()[:1], "€".encode()[1:], b"z"])[0] == ["a", "é", "", "€", "z", ""]
    assert shown([b"\xe2\x82"])[0] == ["", "�"] and shown([b"\xff!"])[0] == ["�!", ""]


def test_what_may_become_a_stop_waits_until_it_is_one_or_is_not():
    assert shown([b"ab\n", b"c", b"\n", b"\nd"], ["\n\n"]) == (["ab", "\nc", "", "", ""], True)
    assert shown([b"x\n"], ["\n\n"]) == (["x", "\n"], False)


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("one END two", ["END"], "one "),
        ("one two", ["END"], "one two"),
        ("xxabyy", ["ab", "xxabyy"], "xx"),  # the first that is complete
        ("xxab", ["ab", "xxab"], ""),  # both at once: the one that starts first
        ("aaab", ["aab"], "a"),
        ("a€b€€c", ["€€"], "a€b"),
        ("END", ["END"], ""),
    ],
)
def test_a_stop_cuts_at_the_same_place_however_the_text_is_cut_into_tokens(text, stop, want):
    data = text.encode()
    for size in range(1, len(data) + 1):
        pieces = [data[i : i + size] for i in range(0, len(data), size)]
        assert "".join(shown(pieces, stop)[0]) == want, size
