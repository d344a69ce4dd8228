"""The token store: made of a corpus part by part, read by a run, described by a card, copied to a machine."""
