"""C that is compiled at set-up, beside ffcv's own."""
