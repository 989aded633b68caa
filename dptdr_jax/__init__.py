"""dptdr_jax."""
