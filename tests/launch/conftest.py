import signal

import pytest
from support.fakes import Fakes


@pytest.fixture
def fakes(tmp_path):
  return Fakes(tmp_path / "fakes")


@pytest.fixture(autouse=True)
def interruptible():
  """Restores SIGINT and SIGHUP, which pytest ignores if it was started in the background or by nohup, and so would its
  children."""
  before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGHUP)}
  yield
  for number, handler in before.items():
    signal.signal(number, handler)
