"""Tasks, one file each: their data and objective; and the setup and measurements around the training loop."""
