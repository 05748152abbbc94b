"""The settings of a run, and the schedules that follow from them. Neither torch nor ffcv."""
