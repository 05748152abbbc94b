"""What every room uses: errors, progress, the log, provenance. Neither torch nor ffcv."""
