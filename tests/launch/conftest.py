import signal

import pytest
from support.fakes import Fakes


@pytest.fixture
def fakes(tmp_path):
  return Fakes(tmp_path / "fakes")


@pytest.fixture(autouse=True)
def interruptible():
  """Scripts react to SIGINT also where pytest was started in the background: there it is ignored, by children too."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)
