"""The paper's tables: which models are trained, how each row is sampled and scored, and the quickstart's strips."""
