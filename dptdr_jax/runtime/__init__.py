"""Meshes and shardings, checkpoints, hosts, metric writers."""
