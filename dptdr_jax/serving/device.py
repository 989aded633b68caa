"""The devices' side of the engine: the bank of prompts, the compiled programs, and how a batch gets there."""

from __future__ import annotations

import collections
import functools
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from dptdr_jax.backbone import Backbone
from dptdr_jax.models import bank
from dptdr_jax.models.bank import Entry, make_entry
from dptdr_jax.models.prompts import PromptSpec
from dptdr_jax.runtime import mesh as meshes
from dptdr_jax.serving.shapes import Shapes
from dptdr_jax.serving.slots import Slots
from dptdr_jax.serving.waiting import Batch


class Device:
  """Bank and programs on the backbone's mesh. One thread sends; `unload` may be called from any.

  Attributes:
    slots: which prompts are in the bank.
    length: P, of the longest prompt that fits.
  """

  def __init__(self, backbone: Backbone, shapes: Shapes, slots: int, length: int):
    self.slots, self.length = Slots(slots), length
    self._backbone, self._shapes = backbone, shapes
    self._dtype = jnp.dtype(backbone.compute_dtype)
    self._unused: collections.deque[Entry] = collections.deque()
    self._everywhere = meshes.replicated(backbone.mesh)
    empty = functools.partial(bank.empty_bank, backbone.config, slots, length, self._dtype)
    self._empty = jax.jit(empty, out_shardings=self._everywhere).lower().compile()
    self._bank = self._empty()

  def compile(self) -> None:
    """Compiles every program, or loads it from JAX's persistent cache."""
    backbone = self._backbone
    write = jax.jit(bank.write, donate_argnums=0, out_shardings=self._everywhere)
    bare = make_entry(backbone.config, PromptSpec("none"), {}, pooling="mean", normalize=False, dtype=self._dtype)
    self._write = write.lower(self._bank, *self._contents(0, bare)).compile()
    represent = jax.jit(functools.partial(bank.represent_rows, backbone.config, compute_dtype=self._dtype))
    rows = meshes.batch_sharding(backbone.mesh)

    def lower(width: int, size: int) -> jax.stages.Lowered:
      tokens, row = (jax.ShapeDtypeStruct(shape, np.int32, sharding=rows) for shape in ((size, width), (size,)))
      return represent.lower(backbone.params, self._bank, tokens, row, row)

    shapes = self._shapes.all()
    with ThreadPoolExecutor(os.cpu_count(), "compile") as pool:  # the compiler does not hold Python's lock
      compiled = [pool.submit(lower(*shape).compile) for shape in shapes]
      self._programs = {shape: one.result() for shape, one in zip(shapes, compiled, strict=True)}

  def measure(self) -> float:
    """Tokens a second, from one full batch of the longest texts."""
    width = self._shapes.widths[-1]
    size = self._shapes.full(width)
    tokens, row = np.zeros((size, width), np.int32), np.zeros(size, np.int32)
    started = time.monotonic()
    jax.block_until_ready(self._run(tokens, row + np.int32(width), row))
    return size * width / (time.monotonic() - started)

  def send(self, batch: Batch) -> jax.Array:
    """Starts to encode a batch: [size, H] float32, of which the first rows are those of the batch."""
    if self._bank.prompts.is_deleted():  # a write failed after it took the bank
      self._bank = self._empty()
      self.slots.clear()
    while self._unused:
      self.slots.forget(self._unused.popleft())
    for entry in self.slots.place(list(dict.fromkeys(row.request.entry for row in batch.rows))):
      self._bank = self._write(self._bank, *self._contents(self.slots[entry], entry))
    tokens = np.full((batch.size, batch.width), self._backbone.config.pad_id, np.int32)
    lengths, slots = np.empty(batch.size, np.int32), np.empty(batch.size, np.int32)
    for at, (request, place) in enumerate(batch.rows):
      ids = request.ids[place]
      tokens[at, : len(ids)], lengths[at], slots[at] = ids, len(ids), self.slots[request.entry]
    for array in (tokens, lengths, slots):  # the other rows repeat the first one; nobody reads their vectors
      array[len(batch.rows) :] = array[0]
    return self._run(tokens, lengths, slots)

  def unload(self, entries: Iterable[Entry]) -> None:
    """Frees the slots of entries before the next batch; one that is used again gets a slot again."""
    self._unused.extend(entries)

  def _run(self, tokens: np.ndarray, lengths: np.ndarray, slots: np.ndarray) -> jax.Array:
    batch = {"tokens": tokens, "lengths": lengths, "slots": slots}
    placed = meshes.put_batch(batch, self._backbone.mesh, whole=())
    program = self._programs[tokens.shape[1], len(tokens)]
    return program(self._backbone.params, self._bank, placed["tokens"], placed["lengths"], placed["slots"])

  def _contents(self, slot: int, entry: Entry) -> tuple:
    """The arguments of `bank.write` behind the bank."""
    values = np.int32(slot), *bank.slot_values(entry, self.length).values()
    return tuple(jax.device_put(value, self._everywhere) for value in values)
