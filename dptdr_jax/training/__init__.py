"""Losses, the optimiser, the state and the jitted steps."""
