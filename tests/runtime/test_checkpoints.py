"""Checkpoints come back bit for bit, on other devices too; damage is told; a killed save leaves nothing behind."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dptdr_jax.core.errors import InputError
from dptdr_jax.runtime.checkpoints import Checkpoints
from dptdr_jax.runtime.mesh import make_mesh, replicated


def make_state(step):
  state = {
    "step": jnp.int32(step),
    "prompt": jax.random.normal(jax.random.key(step), (64, 96)),
    "moments": [jnp.full((3,), 0.1 * step, jnp.bfloat16), None, jnp.array([True, False])],
  }
  return jax.device_put(state, replicated(make_mesh()))


def assert_same(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved(directory, steps):
  checkpoints = Checkpoints(directory)
  for step in steps:
    checkpoints.save(step, make_state(step), {"stage": "train1", "best": [step, 0.25]})
  checkpoints.close()


def test_comes_back_bitwise_with_metadata_and_keeps_the_two_newest(tmp_path):
  assert Checkpoints(tmp_path / "new").restore(make_state(0)) is None
  saved(tmp_path, [2, 4, 6])
  complete = []
  checkpoints = Checkpoints(tmp_path, complete.append)
  assert checkpoints.steps() == [4, 6]
  step, state, metadata = checkpoints.restore(make_state(0))
  assert step == 6
  assert_same(state, make_state(6))
  assert metadata == {"stage": "train1", "best": [6, 0.25]}
  checkpoints.save(6, make_state(7))  # again, as a run does that went back to an older step
  while not complete:
    checkpoints.poll()
  assert complete == [6]
  assert_same(checkpoints.restore(make_state(0))[1], make_state(7))


def test_state_may_be_donated_while_it_is_written(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  advance = jax.jit(lambda x: x + 1, donate_argnums=0)
  like = jax.device_put(jnp.zeros((1000, 1000)), replicated(make_mesh()))
  x = advance(like)
  checkpoints.save(1, {"x": x})
  for _ in range(5):
    x = advance(x)
  np.testing.assert_array_equal(checkpoints.restore({"x": x})[1]["x"], np.ones((1000, 1000)))


def largest_file(directory):
  return max((path for path in pathlib.Path(directory).rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)


def cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(bytes(data))


def metadata_file(directory):
  return directory / "_CHECKPOINT_METADATA"


def list_of_files(directory):
  return directory / "files.json"


@pytest.mark.parametrize(
  ("harm", "which"),
  [
    (cut, largest_file),
    (flip, largest_file),
    (pathlib.Path.unlink, largest_file),
    (flip, metadata_file),
    (pathlib.Path.unlink, metadata_file),
    (cut, list_of_files),
  ],
)
def test_a_damaged_checkpoint_is_set_aside_with_a_warning(tmp_path, harm, which, caplog):
  directory = tmp_path / "checkpoints"
  saved(directory, [4, 6])
  harm(which(directory / "6"))
  checkpoints = Checkpoints(directory)
  step, state, metadata = checkpoints.restore(make_state(0))
  assert step == 4 and metadata["best"] == [4, 0.25]
  assert_same(state, make_state(4))
  assert "the checkpoint of step 6 is damaged" in caplog.text
  assert checkpoints.steps() == [4] and os.listdir(tmp_path / "checkpoints.damaged") == ["6"]
  checkpoints.save(6, make_state(6))
  checkpoints.close()
  assert Checkpoints(directory).restore(make_state(0))[0] == 6
  for step in ("4", "6"):
    harm(which(directory / step))
  with pytest.raises(InputError, match="step 6 is damaged.*none before it is whole") as raised:
    Checkpoints(directory).restore(make_state(0))
  assert raised.value.path == directory / "6" and (directory / "4").exists()


def test_killed_while_saving(tmp_path):
  program = f"""
    import os, signal
    import jax.numpy as jnp
    from dptdr_jax.runtime.checkpoints import Checkpoints
    checkpoints = Checkpoints({str(tmp_path)!r})
    checkpoints.save(1, {{"x": jnp.ones((4, 4))}})
    checkpoints.wait()
    checkpoints.save(2, {{"x": jnp.arange(8_000_000.0)}})
    os.kill(os.getpid(), signal.SIGKILL)
  """
  environment = {**os.environ, "XLA_FLAGS": ""}
  done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True)
  assert done.returncode == -signal.SIGKILL, done.stderr.decode()
  assert [path.name for path in tmp_path.iterdir() if path.name != "1"], "the save was over before the kill"
  checkpoints = Checkpoints(tmp_path)
  assert checkpoints.steps() == [1]
  like = {"x": jax.device_put(jnp.zeros((4, 4)), replicated(make_mesh()))}
  np.testing.assert_array_equal(checkpoints.restore(like)[1]["x"], np.ones((4, 4)))
  checkpoints.save(2, like)
  checkpoints.close()
  assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
  list_of_files(tmp_path / "2").unlink()  # as after a kill at the very end of the save
  assert Checkpoints(tmp_path).restore(like)[0] == 1 and not (tmp_path / "2").exists()
