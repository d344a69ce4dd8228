"""From overrides and conf/ to a checked configuration, and what tells a user about it: help, completion, reference."""
