"""Which prompts are in the bank on the device; the others are on the host."""

from __future__ import annotations

import collections
from collections.abc import Collection

from dptdr_jax.models.bank import Entry


class Slots:
  """Slots of a bank. The least recently used entry makes room.

  Attributes:
    evictions: entries that made room for another.
  """

  def __init__(self, count: int):
    self.evictions = 0
    self._count = count
    self.clear()

  def clear(self) -> None:
    """All slots are free."""
    self._free = list(reversed(range(self._count)))
    self._slots: collections.OrderedDict[Entry, int] = collections.OrderedDict()  # the least recently used one first

  def __len__(self) -> int:
    return len(self._slots)

  def __getitem__(self, entry: Entry) -> int:
    return self._slots[entry]

  def place(self, entries: Collection[Entry]) -> list[Entry]:
    """Gives each of some entries a slot, for one batch; there are at most as many as slots.

    Returns:
      Those that were not in the bank: the caller writes them to their slots.
    """
    for entry in entries:
      if entry in self._slots:
        self._slots.move_to_end(entry)
    added = [entry for entry in entries if entry not in self._slots]
    for entry in added:
      if not self._free:
        oldest = next(iter(self._slots))  # none of `entries`: these are behind all others
        self._free.append(self._slots.pop(oldest))
        self.evictions += 1
      self._slots[entry] = self._free.pop()
    return added

  def forget(self, entry: Entry) -> None:
    """Frees the slot of an entry, if it has one."""
    if entry in self._slots:
      self._free.append(self._slots.pop(entry))
