"""Scores of answers and of where a model looked."""
