"""Where the processes of a run meet: process 0 listens, and each says something and reads what the others said.

Device collectives would not do: a process may wait for hours, and on CPUs they give up after 30 s. The key-value store
of jax.distributed would, but it is not public.
"""

from __future__ import annotations

import collections
import contextlib
import hmac
import json
import secrets
import socket
import threading
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_INVITATION_BYTES = 2048
_HELLO = -1  # not a meeting: whether process 0 answers


class Meetings:
  """The numbered meetings of all processes. All come to the same ones in the same order."""

  def __init__(self, host: str | None = None):
    """All processes call it together: process 0 tells the others by a device collective where it listens.

    Args:
      host: a name of process 0's machine that the others know, if there is one.

    Raises:
      OSError: process 0 cannot be reached.
    """
    invitation = _broadcast(_listen(host) if jax.process_index() == 0 else {})
    self._token = invitation["token"]
    for address in invitation["addresses"]:
      self._place = address, invitation["port"]
      with contextlib.suppress(OSError, EOFError):
        self.say(_HELLO, None)
        return
    raise OSError(f"no answer at {', '.join(invitation['addresses'])}, port {invitation['port']}")

  def say(self, number: int, words: Any) -> dict[int, Any]:
    """Says something that JSON can hold at meeting `number`; returns what was said there so far, by process.

    Raises:
      OSError, EOFError: process 0 is gone.
    """
    with Client(self._place) as connection:  # a new one each time: one that is idle for hours may be cut
      connection.send_bytes(self._token.encode())
      connection.send_bytes(json.dumps([number, jax.process_index(), words]).encode())
      return {int(index): words for index, words in json.loads(connection.recv_bytes()).items()}


def _listen(host: str | None) -> dict[str, Any]:
  """Starts to listen; returns the addresses, the port and the token that others connect with."""
  listener, token = Listener(("", 0), backlog=1024), secrets.token_hex(32)
  addresses = [host] if host else []
  addresses.append(socket.gethostname())
  with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    probe.connect(("203.0.113.1", 9))  # sends nothing: asks which of our addresses leads out of this machine
    addresses.append(probe.getsockname()[0])
  threading.Thread(target=_serve, args=(listener, token.encode()), name="meetings", daemon=True).start()
  return {"addresses": addresses, "port": listener.address[1], "token": token}


def _serve(listener: Listener, token: bytes) -> None:
  meetings: dict[int, dict[int, Any]] = collections.defaultdict(dict)
  lock = threading.Lock()

  def answer(connection: Connection) -> None:
    with connection, contextlib.suppress(OSError, EOFError, ValueError):  # strangers say anything
      if not hmac.compare_digest(connection.recv_bytes(len(token)), token):
        return
      number, index, words = json.loads(connection.recv_bytes())
      with lock:
        meetings[number][index] = words
        meetings.pop(number - 2, None)  # who is here was at the last one, so all have left the one before
        said = json.dumps(meetings[number])
      connection.send_bytes(said.encode())

  while True:
    with contextlib.suppress(OSError):  # gone again before it was accepted
      threading.Thread(target=answer, args=(listener.accept(),), daemon=True).start()


def _broadcast(invitation: dict[str, Any]) -> dict[str, Any]:
  """Process 0's invitation, in every process."""
  padded = np.frombuffer(json.dumps(invitation).encode().ljust(_INVITATION_BYTES), np.uint8)
  return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
