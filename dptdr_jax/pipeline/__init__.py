"""What a run does: one file a stage, `graph` says which artefact is made from which, `run` makes them."""
