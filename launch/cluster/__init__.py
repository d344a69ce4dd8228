"""Everything that knows Ray: its machines and jobs, the workers on them, and the code that travels there."""
