"""Checkpoints of runs, model folders, and their import from and export to foreign formats."""
