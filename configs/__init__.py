"""Configs that come with the package: `--config=configs/NAME.py`."""
