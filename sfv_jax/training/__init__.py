"""A training run: what goes in, the compiled step, the loop, and what watches it."""
