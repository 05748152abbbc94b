"""What a run costs: measured, or computed before it starts."""
