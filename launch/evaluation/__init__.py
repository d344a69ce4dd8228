"""`farspan evaluate`: measuring a checkpoint, and the tables and pictures of its results."""
