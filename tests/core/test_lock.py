"""Two runs in one directory: the second is refused, and a killed one holds nothing."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.core.lock import exclusive

HOLDER = """
import sys, time
from dptdr_jax.core.lock import exclusive
with exclusive(sys.argv[1]):
  print("held", flush=True)
  time.sleep(60)
"""


def test_the_second_is_refused_until_the_first_is_dead(tmp_path):
  holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
  try:
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"process {holder.pid} on .* since"), exclusive(tmp_path):
      pass
  finally:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
  with exclusive(tmp_path), pytest.raises(InputError, match="another run is at work"), exclusive(tmp_path):
    pass
  with exclusive(tmp_path):
    pass
