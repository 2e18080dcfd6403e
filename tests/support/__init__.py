"""Helpers of the tests: references, random weights, small runs, golden files, kills."""
