"""Who has the token takes part in a meeting; a stranger gets no answer and stops nobody."""

import socket
from multiprocessing.connection import Client

import pytest

from dptdr_jax.runtime.meetings import Meetings


def test_a_meeting_of_one_and_strangers():
  meetings = Meetings()
  with socket.create_connection(meetings._place):  # says nothing
    with Client(meetings._place) as stranger, pytest.raises(EOFError):
      stranger.send_bytes(b"0" * 64)
      stranger.recv_bytes()
    for number in range(3):
      assert meetings.say(number, {"stops": number}) == {0: {"stops": number}}
  meetings._place = meetings._place[0], 1
  with pytest.raises(OSError):
    meetings.say(3, None)
