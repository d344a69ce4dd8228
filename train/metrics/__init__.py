"""What a step measures: the time of each of its parts, and what its communication carried."""
