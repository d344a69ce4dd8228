"""The sections of docs/speed.md that programs write."""

from tests.benchmarks.section import write


def test_each_section_replaces_its_own_and_leaves_the_others(tmp_path):
    path = tmp_path / "speed.md"
    write(path, "Mixers", "first")
    write(path, "Whole step", "second")
    path.write_text(path.read_text().replace("# Speed\n", "# Speed\n\nBy hand.\n"))
    write(path, "Mixers", "third\n")
    write(path, "Mixers", "third")
    found = path.read_text()
    assert found.startswith("# Speed\n\nBy hand.\n") and found.count("## Mixers") == found.count("## Whole step") == 1
    assert "first" not in found and found.index("third") < found.index("second")
