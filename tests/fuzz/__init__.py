"""Forged tables and mutated manifests, more than the tests hold: `python -m tests.fuzz --help`."""
