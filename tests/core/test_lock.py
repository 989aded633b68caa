"""Two runs in one directory: the second is refused, and a killed one holds nothing; without locks a warning says so."""

from __future__ import annotations

import errno
import fcntl
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


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog, number):
  def refuses(stream, operation):
    raise OSError(number, "no locks")

  monkeypatch.setattr(fcntl, "flock", refuses)
  with exclusive(tmp_path), exclusive(tmp_path):
    pass
  assert f"{tmp_path}/lock cannot be locked" in caplog.text and "a second run" in caplog.text
