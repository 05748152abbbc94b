"""What a run stands on: the processes of a run and their devices."""
