"""Helpers of the tests: torch references, random weights, small runs, golden files, kills."""
