"""Weights on disk: strict readers and writers of the diffusers, single-file and hub layouts, without torch."""
