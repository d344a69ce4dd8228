"""One run: its attempts on this machine, or as a job of a cluster, and what is said at its end."""
