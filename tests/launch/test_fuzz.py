"""Any value of any key: an answer, or one line. A few of the cases that `make fuzz` runs by the thousand."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.commands import convert, generate
from launch.commands.arguments import job_arguments, positional
from launch.errors import UserError
from launch.run.export import Export
from tests import fuzz


@pytest.mark.composes
@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(number=st.integers(0, 1_000_000))
def test_no_value_of_a_key_ends_in_a_traceback(number, tmp_path_factory):
    place = tmp_path_factory.getbasetemp() / "fuzz"
    place.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FARSPAN_TRACEBACK", "1")
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        patch.setenv("HOME", str(place))
        patch.chdir(place)
        arguments = fuzz.case(number, place)
        assert fuzz.verdict(arguments) is None, arguments


def _asked(verb: str, key: str, value: str) -> None:
    word = f"{key}={value}"
    if verb == "generate":
        generate._parse(["RUN", word])[1].prompts()
    elif verb == "import":
        positional("import", ["SOURCE", word], convert.Import, ("SOURCE", "DEST"), least=1, also=("run.dir",))
    elif verb == "export":
        positional("export", ["RUN", "DEST", word], Export, ("RUN", "DEST"), least=2)
    else:
        job_arguments("status", ["JOB", word])


KEYS = {
    "generate": [*generate.Request.__dataclass_fields__, "cluster.workers", "generate.seed", "x"],
    "import": [*convert.Import.__dataclass_fields__, "run.dir", "x"],
    "export": [*Export.__dataclass_fields__, "x"],
    "status": ["cluster.address", "x"],
}


@pytest.mark.parametrize("verb", KEYS)
def test_keys_of_verbs_that_read_their_own(verb):
    for key in KEYS[verb]:
        for value in fuzz.VALUES:
            try:
                _asked(verb, key, value)
            except UserError as error:
                assert str(error)
