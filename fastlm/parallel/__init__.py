"""Several processes: this one among them, wrappers of the model, sharded checkpoints."""
