"""Exact maximum inner product search on the devices: the corpus is read once, in blocks that are sharded over all.

All lists are in the order of rows: passages within a tile, tiles of a device, the devices' shares of a block, blocks.
So a stable top-k over lists that are joined in this order breaks ties by ascending row.

The only file of this room that imports jax.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dptdr_jax.core import preemption, progress
from dptdr_jax.core.errors import InputError
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.retrieval.runs import FILL, Run
from dptdr_jax.retrieval.search import checked_queries

DTYPES = ("float32", "bfloat16")
_SHARD = "shard"
_ROWS = 128  # tiles are multiples of this: the width of a TPU's vector registers, and divisible by every group
_PIECE_ROWS = 16_384  # read from disk at a time
_DEVICE_BYTES = 1 << 29  # of corpus on a device: the block that is searched and the one that is being placed
_PAIRS = 1 << 25  # rescored in one pass over the corpus: 0.7 GB of rows, places and scores


def search_devices(
  queries: np.ndarray,
  passages: Embeddings | np.ndarray,
  k: int,
  *,
  mesh: Mesh,
  dtype: str = "float32",
  rescore: int = 0,
  query_rows: int = 1024,
  tile_rows: int = 16_384,
) -> Run:
  """Finds the k passages of largest inner product for each query, as `search_exact` does, on accelerators.

  Each passage is read and sent to one device once: a block of the corpus is searched for all queries while the next one
  is placed. A device searches its share in tiles and keeps the best k; at a block's end these [query_rows, k]
  candidates are exchanged (an all-to-all: every device merges its own queries), and nothing else travels.

  In float32 products are exact to float32 (no TF32, no bfloat16 passes): ids equal FAISS' except for ties within its
  rounding. In bfloat16 queries and passages are rounded to 8 bits and summed in float32: the error of a score is about
  0.002 · |q| · |p| / √H, and neighbours in rank are swapped. `rescore` corrects that.

  Memory on a device: 0.5 GB of corpus, 8 · query_rows · tile_rows bytes of scores, 8 · Q · k / devices of run.

  Args:
    queries, passages, k: as `search_exact` takes them.
    mesh: the devices; of several processes, only this one's are used.
    dtype: "float32" or "bfloat16" (half the memory and traffic, the fast matrix units).
    rescore: r ≥ 1 searches the best r · k and orders them by float32 scores of the stored vectors, in another pass over
      the corpus on the host; 2 is ample for bfloat16. 0: the devices' scores.
    query_rows: queries at a time, rounded up to a multiple of the devices.
    tile_rows: passages scored at a time.

  Raises:
    InputError: queries of another width, an unknown dtype, a number that is not finite.
  """
  width = passages.shape[1] if isinstance(passages, np.ndarray) else passages.width
  queries = checked_queries(queries, width)
  if dtype not in DTYPES:
    raise InputError(f"devices search in {' or '.join(DTYPES)}", value=dtype)
  run = Run.empty(len(queries), k)
  depth = min(k * max(rescore, 1), len(passages))
  if not depth or not len(queries):
    return run
  plan = Plan.make(mesh.local_devices, len(passages), width, dtype, tile_rows)
  best = _search(queries, passages, depth, plan, query_rows)
  if not np.isfinite(best.scores).all():
    raise InputError("a passage vector has a number that is not finite", fix="Look for NaN in the encoder")
  if rescore:
    best = _rescored(queries, passages, best)
  kept = min(k, depth)
  run.rows[:, :kept], run.scores[:, :kept] = best.rows[:, :kept], best.scores[:, :kept]
  return run


@dataclasses.dataclass(frozen=True)
class Plan:
  """How a corpus is divided: blocks of [devices · share, width], each share in tiles of `tile` rows."""

  mesh: Mesh
  share: int
  tile: int
  width: int
  dtype: str

  @classmethod
  def make(cls, devices: list[jax.Device], count: int, width: int, dtype: str, tile_rows: int) -> Plan:
    """Blocks, and tiles in them, are of one size, with little padding: as few as possible, of even size."""
    most = max(_ROWS, _DEVICE_BYTES // 2 // (width * jnp.dtype(dtype).itemsize))
    each = -(-count // len(devices))
    share = -(-each // -(-each // most))
    tiles = -(-share // max(tile_rows, _ROWS))
    tile = -(-share // (tiles * _ROWS)) * _ROWS
    return cls(Mesh(np.array(devices), (_SHARD,)), tile * tiles, tile, width, dtype)

  @property
  def block(self) -> int:
    """Rows of a block."""
    return self.share * self.mesh.size

  def place(self, passages: Embeddings | np.ndarray, first: int) -> jax.Array:
    """Places the block that begins at row `first`, share by share; zeros beyond the corpus."""
    shares = []
    for number, device in enumerate(self.mesh.devices):
      share = np.zeros((self.share, self.width), jnp.dtype(self.dtype))
      start = first + number * self.share
      for row, vectors in _pieces(passages, range(start, min(start + self.share, len(passages)))):
        share[row - start : row - start + len(vectors)] = vectors
      shares.append(jax.device_put(share, device))
    sharding = NamedSharding(self.mesh, PartitionSpec(_SHARD))
    return jax.make_array_from_single_device_arrays((self.block, self.width), sharding, shares)


def _search(queries: np.ndarray, passages: Embeddings | np.ndarray, depth: int, plan: Plan, query_rows: int) -> Run:
  """All blocks for all queries; depth is at most C."""
  devices = plan.mesh.size
  size = -(-min(query_rows, len(queries)) // devices) * devices
  group = group_size(plan.mesh.devices[0].platform, plan.tile, depth)
  whole = NamedSharding(plan.mesh, PartitionSpec())
  by_query = NamedSharding(plan.mesh, PartitionSpec(_SHARD))
  empty = jax.device_put(tuple(dataclasses.astuple(Run.empty(size, depth))[::-1]), by_query)
  starts = range(0, len(queries), size)
  best = dict.fromkeys(starts, empty)
  firsts = range(0, len(passages), plan.block)
  shown = progress.bar(f"device search, {len(firsts)} blocks", len(firsts) * len(queries), "query")
  with shown as bar, concurrent.futures.ThreadPoolExecutor(1) as reader:
    coming = reader.submit(plan.place, passages, 0)
    for first in firsts:
      block = coming.result()
      if first + plan.block < len(passages):
        coming = reader.submit(plan.place, passages, first + plan.block)
      behind = empty
      for start in starts:
        some = queries[start : start + size].astype(jnp.dtype(plan.dtype))
        some = jax.device_put(np.pad(some, ((0, size - len(some)), (0, 0))), whole)
        best[start] = search_block(
          *best[start], some, block, first, len(passages), mesh=plan.mesh, tile=plan.tile, group=group
        )
        jax.block_until_ready(behind)  # at most two steps at a time: bounds the memory of the devices
        behind = best[start]
        bar.advance(min(size, len(queries) - start))
      jax.block_until_ready(behind)  # frees the block before the reader places the one after the next
      preemption.check("the search will begin again")
  scores, rows = (np.concatenate([best[start][part] for start in starts])[: len(queries)] for part in (0, 1))
  return Run(rows, scores)


@functools.partial(jax.jit, static_argnames=("mesh", "tile", "group"))
def search_block(
  scores: jax.Array, rows: jax.Array, queries: jax.Array, block: jax.Array, first: int, stop: int, *, mesh: Mesh,
  tile: int, group: int,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
  """Merges a block's best passages into the best so far, whose rows are lower; see `search_share`.

  Args:
    scores, rows: [q, k], sharded by query, as the results are; q is a multiple of the devices.
    queries: [q, H], on every device in full.
    block: [devices · n, H], sharded by passage, in the queries' dtype.
    first: corpus row of the block's first passage.
    stop: corpus row from which on the block is padding.
    mesh: one axis over all devices.
  """
  (axis,) = mesh.axis_names

  def on_device(scores, rows, queries, share, first, stop):
    shape = (len(queries), scores.shape[1])
    empty = (jnp.full(shape, -jnp.inf, jnp.float32), jnp.full(shape, FILL, jnp.int32))
    empty = jax.tree.map(lambda values: jax.lax.pcast(values, axis, to="varying"), empty)
    start = first + jax.lax.axis_index(axis) * len(share)
    own = search_share(*empty, queries, share, start, stop, tile=tile, group=group)
    scores, rows = (
      jnp.concatenate([best, _exchange(mine, axis, mesh.size)], 1)
      for best, mine in zip((scores, rows), own, strict=True)
    )
    scores, at = _top_k(scores, shape[1])
    return scores, jnp.take_along_axis(rows, at, 1)

  shard, whole = PartitionSpec(axis), PartitionSpec()
  specs = (shard, shard, whole, shard, whole, whole)
  return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=(shard, shard))(
    scores, rows, queries, block, first, stop
  )


def _exchange(mine: jax.Array, axis: str, devices: int) -> jax.Array:
  """[q, k] of one device's passages → [q / devices, devices · k] of all devices, in their order."""
  parts = jax.lax.all_to_all(mine.reshape(devices, -1, mine.shape[1]), axis, 0, 0)
  return jnp.moveaxis(parts, 0, 1).reshape(parts.shape[1], -1)


def search_share(
  scores: jax.Array, rows: jax.Array, queries: jax.Array, share: jax.Array, first: jax.Array, stop: jax.Array, *,
  tile: int, group: int,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
  """Merges the best passages of one device's share into the best so far, tile by tile.

  With `group` g > 1 only k · g passages of a tile are ranked: the members of the k groups of g neighbours with the
  largest maximum (of equal ones the first). Each of these groups has a member that precedes all members of any other
  group, so the tile's best k are in them. That is exact, unlike `jax.lax.approx_max_k`.

  Args:
    scores: float32 [q, k], descending, −inf at fills.
    rows: int32 [q, k], lower than the share's.
    queries: [q, H] in the share's dtype.
    share: [n, H]; its first passage has corpus row `first`, and from row `stop` on it is padding.
    tile: passages scored at a time, at most 2^31 / q; divides n.
    group: passages a group, a divisor of `tile`; k groups at least a tile, unless 1.

  Returns:
    Scores and rows [q, k], best first, ties by row.
  """
  k = scores.shape[1]
  precision = jax.lax.Precision.HIGHEST if share.dtype == jnp.float32 else None

  def one_tile(best: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, jax.Array]):
    passages, start = inputs
    products = jnp.einsum("qh,th->qt", queries, passages, precision=precision, preferred_element_type=jnp.float32)
    products = jnp.where(products == 0, 0.0, products)  # top_k ranks −0 below 0
    products = jnp.where(start + jax.lax.iota(jnp.int32, tile) < stop, products, -jnp.inf)
    if group > 1:
      products = products.reshape(len(queries), -1, group)
      groups = jnp.sort(_top_k(products.max(2), k)[1], 1)
      products = jax.vmap(lambda of, at: of[at])(products, groups).reshape(len(queries), -1)
    # The best so far come first: they win ties, and a partial sort that begins with them skips most others.
    scores, at = _top_k(jnp.concatenate([best[0], products], 1), k)
    place = jnp.maximum(at - k, 0)
    if group > 1:
      place = group * jnp.take_along_axis(groups, place // group, 1) + place % group
    return (scores, jnp.where(at < k, jnp.take_along_axis(best[1], at % k, 1), start + place)), None

  tiles = share.reshape(-1, tile, share.shape[1])
  return jax.lax.scan(one_tile, (scores, rows), (tiles, first + tile * jnp.arange(len(tiles))))[0]


def _top_k(values: jax.Array, k: int) -> list[jax.Array]:
  """The k largest of each row and their places, equal ones by place."""
  # XLA would fuse a slice of the result (a part to send) with it and sort everything: 100 × the time.
  # (One barrier around both results crashes the CPU compiler of jaxlib 0.10.)
  return [jax.lax.optimization_barrier(part) for part in jax.lax.top_k(values, k)]


def group_size(platform: str, tile: int, k: int) -> int:
  """Passages a group: the number for which the two top-k, over tile / g maxima and over k · g members, read least.

  On a CPU 1: its top_k is a partial sort, one pass over the tile (measured). Elsewhere the cost of a top_k is assumed
  to be that of a sort, which is not measured yet: benchmarks/device_search.py --group does it.
  """
  if platform == "cpu":
    return 1
  return min((1 << power for power in range(8)), key=lambda g: tile if g == 1 else tile // g + k * g)


def _pieces(passages: Embeddings | np.ndarray, rows: range) -> Iterator[tuple[int, np.ndarray]]:
  """Yields (first row, float32 [≤ _PIECE_ROWS, H]) over some rows; nothing for an empty range."""
  for first in range(rows.start, rows.stop, _PIECE_ROWS):
    stop = min(first + _PIECE_ROWS, rows.stop)
    if isinstance(passages, Embeddings):
      yield first, passages.take(np.arange(first, stop))
    else:
      yield first, np.asarray(passages[first:stop], np.float32)


def _rescored(queries: np.ndarray, passages: Embeddings | np.ndarray, run: Run) -> Run:
  """The same passages with their float32 scores: one pass over the corpus for as many queries as fit in memory."""
  size = max(1, _PAIRS // run.depth)
  starts = range(0, len(run), size)
  exact = np.empty_like(run.scores)
  low, high = int(run.rows.min()), int(run.rows.max()) + 1
  with progress.bar("rescore", len(starts) * (high - low), "passage") as shown:
    for start in starts:
      rows = run.rows[start : start + size].ravel()
      order = np.argsort(rows, kind="stable")
      ordered, scores = rows[order], exact[start : start + size].reshape(-1)
      for first, vectors in _pieces(passages, range(low, high)):
        ends = np.searchsorted(ordered, [first, first + len(vectors)])
        for begin in range(ends[0], ends[1], _PIECE_ROWS):
          pairs = order[begin : min(begin + _PIECE_ROWS, ends[1])]
          some = queries[start + pairs // run.depth]
          scores[pairs] = np.einsum("nh,nh->n", some, vectors[rows[pairs] - first])
        shown.advance(len(vectors))
  return Run.ranked(run.rows, exact)
