"""A run's directory: its state, manifest, metrics, plots and report."""
