"""Stores of this package, checkpoints of runs and model folders, and the way into and out of them."""
