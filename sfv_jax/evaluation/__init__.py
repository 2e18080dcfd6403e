"""Scores of generated videos, and the reports that present them."""
