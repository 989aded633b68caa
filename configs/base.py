"""All settings at their defaults: docs/configuration.md lists them. The other configs say only what differs."""

from dptdr_jax.settings import config_dict


def get_config():
  """The defaults; a backbone and a folder of data are still to be named."""
  return config_dict()
