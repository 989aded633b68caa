"""From source formats to batches. No jax here, so that loader workers never touch an accelerator."""
