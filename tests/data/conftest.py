"""Properties are tried on the same examples every time, and leave no files; FARSPAN_EXAMPLES says how many."""

import os

from hypothesis import settings

EXAMPLES = int(os.environ.get("FARSPAN_EXAMPLES", 40))
settings.register_profile("farspan", max_examples=EXAMPLES, database=None, derandomize=True, deadline=None)
settings.load_profile("farspan")
