"""When each part of a run happens: the loop, its state, and what is recorded of it."""
