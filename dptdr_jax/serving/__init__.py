"""Serves many tasks on one backbone."""
