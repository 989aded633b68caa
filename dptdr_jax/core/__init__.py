"""What every room may import and that imports none: errors, files, manifests, progress. No jax here."""
