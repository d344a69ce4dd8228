"""Overrides and conf/ become a checked configuration here; help, completion and the reference read the same files."""
