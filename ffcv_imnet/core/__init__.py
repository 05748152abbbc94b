"""What every layer uses: errors, progress, the log, provenance. Neither torch nor ffcv."""
