"""Sections of a document that programs write: each replaces its own and leaves the others alone."""

from pathlib import Path

SPEED = Path(__file__).resolve().parents[2] / "docs/speed.md"


def write(path: Path, title: str, text: str) -> None:
    """Puts `text` under "## title", between two comments that mark it; in the place of what it wrote before."""
    begin, end = f"<!-- begin: {title} -->", f"<!-- end: {title} -->"
    whole = path.read_text(encoding="utf-8") if path.exists() else "# Speed\n"
    section = f"{begin}\n## {title}\n\n{text.strip()}\n{end}\n"
    if begin in whole:
        before, _, rest = whole.partition(begin)
        whole = before + section + rest.partition(f"{end}\n")[2]
    else:
        whole = f"{whole.rstrip()}\n\n{section}"
    path.write_text(whole, encoding="utf-8")
