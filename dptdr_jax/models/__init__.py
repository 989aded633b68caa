"""The frozen encoder and the prompts: jax and flax only."""
