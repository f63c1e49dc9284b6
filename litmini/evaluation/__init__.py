"""Perplexity, exact match, lm-eval tasks, and the checks of verify.py."""
