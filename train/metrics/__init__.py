"""The measurements of a step: the time of each of its parts, and what its communication carried."""
