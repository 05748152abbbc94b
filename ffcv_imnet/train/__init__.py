"""One run: epochs forward, evaluation, optimizers, checkpoints, the run's folder."""
