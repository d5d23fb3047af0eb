"""Beyond one process: the command that trains on several."""
