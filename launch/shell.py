"""Commands as farspan prints them: a shell reads each back as the words that were meant, and Hydra as the texts."""

import re
import shlex

_PLAIN = re.compile(r"[A-Za-z0-9_/.][A-Za-z0-9_/.:@%+-]*")  # which neither a shell nor Hydra takes for something else
_SAYS_ELSE = re.compile(r"null|true|false|nan|inf(inity)?|[\d_]*\.?[\d_]*(e[-+]?[\d_]+)?", re.IGNORECASE)


def override(key: str, text: object) -> str:
    """`key=text` as a word of a command line: whatever text it is, `farspan` reads it back as that."""
    value = str(text)
    if _PLAIN.fullmatch(value) and not _SAYS_ELSE.fullmatch(value):
        return f"{key}={value}"
    quoted = quote(value)
    return shlex.quote(f"{key}={quoted}") if set(quoted) & set('"$`\\!') else f'{key}="{quoted}"'


def quote(text: str) -> str:
    """A text in the quotes that Hydra reads, as a program hands it over: without those of a shell."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + (r"\'" if found[2] else ""), text)
    return "'" + escaped.replace("${", r"\${") + "'"


def command(verb: str, *words: str) -> str:
    """`farspan VERB …`; words: as they stand: from `override`, or quoted by `shlex.quote`."""
    return " ".join(["farspan", verb, *words])
