"""Checkpoints and Hugging Face's folders: written complete or not at all, read without running anything of theirs."""
