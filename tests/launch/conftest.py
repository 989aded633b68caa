import signal

import pytest
from support.fakes import Fakes


@pytest.fixture
def fakes(tmp_path):
  return Fakes(tmp_path / "fakes")


@pytest.fixture(autouse=True)
def interruptible():
  """Scripts react to SIGINT and SIGHUP also where pytest was started in the background, or by nohup: there these are
  ignored, and by children, too."""
  before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGHUP)}
  yield
  for number, handler in before.items():
    signal.signal(number, handler)
