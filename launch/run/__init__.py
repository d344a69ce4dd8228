"""A run's folder: its files, its state, its progress, and the signals that stop it. No Ray, and no torch at import."""
