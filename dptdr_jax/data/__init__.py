"""From files to batches. No jax, so that reading data never touches an accelerator."""
