"""Experts: which a token takes, the order they run in, their products, and how these are tiled."""
