"""The proof of a layout: a run shrunk to seconds, spread over processes here, held to one process."""
