"""Faults put into real runs, small in CI and large by hand: `python -m tests.faults --help`."""
