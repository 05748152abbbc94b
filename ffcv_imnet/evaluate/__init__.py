"""Trained networks, and how good they are."""
