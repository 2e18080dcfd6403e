"""Weights on disk: diffusers layouts in and out, strict both ways, without torch."""
