"""Before a run: what this machine can do, what a config needs, and known mistakes in a loss."""
