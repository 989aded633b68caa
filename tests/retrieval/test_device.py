"""Search on eight simulated devices and on one, against FAISS and numpy."""

from __future__ import annotations

import re
import threading

import faiss
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from support.vectors import embeddings, gaussian, integers, same

from dptdr_jax.core.errors import InputError
from dptdr_jax.retrieval import device
from dptdr_jax.retrieval.device import search_block, search_devices, search_share
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.retrieval.search import search_exact

COUNT, WIDTH, QUERIES = 5003, 64, 37  # a prime: eight devices never share it evenly
SMALLEST = 2 * 128 * WIDTH * 4  # bytes a device: two blocks of the fewest rows


def mesh_of(devices: int) -> Mesh:
  """As runtime/mesh.py makes them, with two axes."""
  return Mesh(np.array(jax.devices()[:devices]).reshape(-1, 2 if devices > 1 else 1), ("data", "fsdp"))


def same_but_for_ties(got: Run, scores: np.ndarray, rows: np.ndarray) -> None:
  """Scores are within 1e-5 of the largest; rows are equal where no neighbour in rank is as near."""
  near = 1e-5 * np.abs(scores).max()
  np.testing.assert_allclose(got.scores, scores, rtol=0, atol=near)
  gaps = np.pad(np.diff(-scores, axis=1), ((0, 0), (1, 1)), constant_values=np.inf)
  alone = np.minimum(gaps[:, :-1], gaps[:, 1:]) > 2 * near
  alone[:, -1] = False  # the rank that was cut off is not known
  assert alone.mean() > 0.9
  assert np.array_equal(got.rows[alone], rows[alone])


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("device_bytes", [1 << 29, SMALLEST])
def test_real_numbers_are_ranked_as_by_faiss_flat(tmp_path, monkeypatch, devices, device_bytes):
  monkeypatch.setattr(device, "_DEVICE_BYTES", device_bytes)
  passages, queries = gaussian((COUNT, WIDTH), 0), gaussian((QUERIES, WIDTH), 1)
  index = faiss.IndexFlatIP(WIDTH)
  index.add(passages)
  for source in (passages, embeddings(tmp_path / "e", passages, 1700)):
    got = search_devices(queries, source, 50, mesh=mesh_of(devices))
    assert (got.rows.dtype, got.scores.dtype) == (np.int32, np.float32)
    same_but_for_ties(got, *index.search(queries, 50))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("k", [1, 90])
def test_ties_are_ordered_by_row_across_tiles_devices_and_blocks(monkeypatch, devices, dtype, k):
  monkeypatch.setattr(device, "_DEVICE_BYTES", 2 * 384 * 8 * 4)
  passages, queries = integers((COUNT, 8), 0), integers((QUERIES, 8), 1)
  queries[0] = 0  # ties with everything, and its products are 0 and −0
  got = search_devices(queries, passages, k, mesh=mesh_of(devices), dtype=dtype, tile_rows=128, query_rows=16)
  same(got, search_exact(queries, passages, k))


@pytest.mark.parametrize(("count", "k"), [(5, 9), (300, 300), (300, 1000), (1, 1), (0, 3)])
def test_depth_beyond_the_corpus_is_filled(count, k):
  passages, queries = integers((count, WIDTH), 0), integers((3, WIDTH), 1)
  for dtype, rescore in (("float32", 0), ("bfloat16", 2)):
    got = search_devices(queries, passages, k, mesh=mesh_of(8), dtype=dtype, rescore=rescore)
    same(got, search_exact(queries, passages, k))
  assert search_devices(queries[:0], passages, k, mesh=mesh_of(8)).rows.shape == (0, k)


@pytest.mark.parametrize("tile", [128, 512])
@pytest.mark.parametrize(("group", "k"), [(2, 64), (8, 5), (128, 1)])
def test_groups_of_passages_leave_nothing_out(tile, group, k):
  passages, queries = integers((1024, 8), 0), integers((7, 8), 1)
  best = Run.empty(len(queries), k)
  scores, rows = search_share(best.scores, best.rows, queries, passages, 100, 1100, tile=tile, group=group)
  expected = search_exact(queries, passages[:1000], k)
  same(Run(np.asarray(rows) - 100, np.asarray(scores)), expected)


def test_group_sizes():
  assert device.group_size("cpu", 16384, 100) == 1
  assert [device.group_size("tpu", 16384, k) for k in (1, 100, 1000, 16384)] == [128, 16, 4, 1]
  for k in (1, 7, 128, 3000):  # there are k groups to choose
    group = device.group_size("gpu", 2048, k)
    assert group == 1 or 2048 // group >= k


@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_rescored_bfloat16_is_the_exact_search(tmp_path, monkeypatch, stored):
  passages, queries = gaussian((COUNT, WIDTH), 0), gaussian((QUERIES, WIDTH), 1)
  passages[4000:4100] = passages[:100]  # ties of real numbers
  source = embeddings(tmp_path / "e", passages, 1700, stored)
  expected = search_exact(queries, source, 20)
  search = dict(mesh=mesh_of(8), dtype="bfloat16")
  rounded = search_devices(queries, source, 20, **search)
  assert np.abs(rounded.scores - expected.scores).max() > 1e-3
  assert 0.5 < (rounded.rows == expected.rows).mean() < 1
  got = search_devices(queries, source, 20, rescore=2, **search)
  same_but_for_ties(got, expected.scores, expected.rows)
  monkeypatch.setattr(device, "_PAIRS", 40 * 7)  # seven queries a pass
  monkeypatch.setattr(device, "_PIECE_ROWS", 33)
  same(search_devices(queries, source, 20, rescore=2, **search), got)


def watched(monkeypatch, before):
  """Calls `before(block)` ahead of every step; returns the list of the blocks' first rows."""
  firsts = []

  def step(scores, rows, queries, block, first, stop, **options):
    before(block)
    firsts.append(first)
    return search_block(scores, rows, queries, block, first, stop, **options)

  monkeypatch.setattr(device, "search_block", step)
  return firsts


def test_one_compilation_and_two_blocks_on_the_devices(monkeypatch):
  monkeypatch.setattr(device, "_DEVICE_BYTES", SMALLEST)

  def check(block):
    assert block.addressable_shards[0].data.nbytes <= SMALLEST // 2
    assert sum(other.shape == block.shape for other in jax.live_arrays()) <= 2

  firsts = watched(monkeypatch, check)
  passages, queries = gaussian((COUNT, WIDTH), 0), gaussian((QUERIES, WIDTH), 1)
  compiled = search_block._cache_size()
  search = dict(mesh=mesh_of(8), query_rows=16)
  search_devices(queries, passages, 13, **search)
  assert firsts == np.repeat(range(0, COUNT, 8 * 128), 3).tolist()  # a block stays for all batches of queries
  assert search_block._cache_size() == compiled + 1
  search_devices(queries[:20], passages[:3000], 13, **search)  # other queries, another corpus
  assert search_block._cache_size() == compiled + 1


def test_next_block_is_read_while_one_is_searched(monkeypatch):
  monkeypatch.setattr(device, "_DEVICE_BYTES", SMALLEST)
  begun = threading.Semaphore(0)
  place = device.Plan.place

  def placing(*arguments):
    begun.release()
    return place(*arguments)

  monkeypatch.setattr(device.Plan, "place", placing)
  blocks = -(-COUNT // 1024)
  taken = iter([2] + [1] * (blocks - 2) + [0])  # of the first block and the second, then of one more each

  def check(block):
    assert all(begun.acquire(timeout=20) for _ in range(next(taken)))

  firsts = watched(monkeypatch, check)
  search_devices(gaussian((3, WIDTH), 1), gaussian((COUNT, WIDTH), 0), 5, mesh=mesh_of(8))
  assert len(firsts) == blocks


@pytest.mark.parametrize(("dtype", "tile"), [("float32", 128), ("bfloat16", 512)])
def test_only_candidates_travel_between_devices(dtype, tile):
  mesh, queries, k, share = Mesh(np.array(jax.devices()[:8]), ("shard",)), 16, 10, 512
  arguments = (
    jax.ShapeDtypeStruct((queries, k), jnp.float32), jax.ShapeDtypeStruct((queries, k), jnp.int32),
    jax.ShapeDtypeStruct((queries, WIDTH), dtype), jax.ShapeDtypeStruct((8 * share, WIDTH), dtype), 0, 4000,
  )  # fmt: skip
  text = search_block.lower(*arguments, mesh=mesh, tile=tile, group=1).compile().as_text()
  moves = re.findall(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)
  assert {kind for _, kind in moves} == {"all-to-all"}
  sizes = [
    np.prod([int(n) for n in shape.split(",")]) for result, _ in moves for shape in re.findall(r"\[([\d,]+)\]", result)
  ]
  assert sum(sizes) == 2 * queries * k  # scores and rows
  assert " sort(" not in text  # top_k is not turned into a sort, also where the share is one tile


def test_bad_arguments_are_named():
  passages, queries, mesh = gaussian((300, WIDTH), 0), gaussian((3, WIDTH), 1), mesh_of(1)
  with pytest.raises(InputError, match="passages have width 64"):
    search_devices(queries[:, :60], passages, 3, mesh=mesh)
  with pytest.raises(InputError, match="float32 or bfloat16: 'float16'"):
    search_devices(queries, passages, 3, mesh=mesh, dtype="float16")
  passages[7, 7] = np.nan
  with pytest.raises(InputError, match="passage vector has a number that is not finite"):
    search_devices(queries, passages, 3, mesh=mesh)


def test_failed_read_ends_the_search(monkeypatch):
  def pieces(passages, rows):
    raise OSError("disk gone")

  monkeypatch.setattr(device, "_pieces", pieces)
  with pytest.raises(OSError, match="disk gone"):
    search_devices(gaussian((3, WIDTH), 1), gaussian((300, WIDTH), 0), 3, mesh=mesh_of(1))
