"""Checkpoints come back bit for bit, on other devices too; damage is named, a killed save leaves nothing behind."""

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
from dptdr_jax.runtime import hosts
from dptdr_jax.runtime.checkpoints import Checkpoints
from dptdr_jax.runtime.mesh import make_mesh, replicated


def make_state(step, sharding=None):
  state = {
    "step": jnp.int32(step),
    "prompt": jax.random.normal(jax.random.key(step), (64, 96)),
    "moments": [jnp.full((3,), 0.1 * step, jnp.bfloat16), None, jnp.array([True, False])],
  }
  return jax.device_put(state, sharding or replicated(make_mesh()))


def assert_same(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved(directory, steps, keep=2):
  checkpoints = Checkpoints(directory, keep=keep)
  for step in steps:
    checkpoints.save(step, make_state(step), {"stage": "train1", "best": [step, 0.25]})
  checkpoints.close()


def test_comes_back_bitwise_with_metadata_and_keeps_the_newest(tmp_path):
  saved(tmp_path, [2, 4, 6])
  checkpoints = Checkpoints(tmp_path, keep=2)
  assert checkpoints.steps() == [4, 6] and checkpoints.latest() == 6
  step, state, metadata = checkpoints.restore(make_state(0))
  assert step == 6
  assert_same(state, make_state(6))
  assert metadata == {"stage": "train1", "best": [6, 0.25]}
  checkpoints.save(6, make_state(7))  # again, as a run does that went back to an older step
  assert_same(checkpoints.restore(make_state(0))[1], make_state(7))


def test_empty_directory_has_no_latest(tmp_path):
  checkpoints = Checkpoints(tmp_path / "new")
  assert checkpoints.latest() is None and checkpoints.restore(make_state(0)) is None


def test_state_may_be_donated_while_it_is_written(tmp_path):
  checkpoints = Checkpoints(tmp_path)
  advance = jax.jit(lambda x: x + 1, donate_argnums=0)
  like = jax.device_put(jnp.zeros((1000, 1000)), replicated(make_mesh()))
  x = advance(like)
  checkpoints.save(1, {"x": x})
  for _ in range(5):
    x = advance(x)
  np.testing.assert_array_equal(checkpoints.restore({"x": x})[1]["x"], np.ones((1000, 1000)))


def test_from_eight_devices_onto_four(tmp_path):
  saved(tmp_path, [1])
  four = make_mesh(devices=jax.devices()[:4])
  like = jax.eval_shape(lambda: make_state(0))
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(four)), like)
  _, state, _ = Checkpoints(tmp_path).restore(like)
  assert state["prompt"].sharding.device_set == set(jax.devices()[:4])
  assert_same(state, make_state(1))


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


@pytest.mark.parametrize(
  ("harm", "which"),
  [
    (cut, largest_file),
    (flip, largest_file),
    (pathlib.Path.unlink, largest_file),
    (cut, metadata_file),
    (pathlib.Path.unlink, metadata_file),
  ],
)
def test_damage_is_told_and_set_aside(tmp_path, harm, which, caplog):
  directory = tmp_path / "checkpoints"
  saved(directory, [2, 4, 6], keep=3)
  for step in ("4", "6"):
    harm(which(directory / step))
  checkpoints = Checkpoints(directory, keep=3)
  step, state, metadata = checkpoints.restore(make_state(0))
  assert step == 2 and metadata["best"] == [2, 0.25]
  assert_same(state, make_state(2))
  assert "the checkpoint of step 6 is damaged" in caplog.text and "the checkpoint of step 4 is damaged" in caplog.text
  assert checkpoints.steps() == [2] and sorted(os.listdir(tmp_path / "checkpoints.damaged")) == ["4", "6"]
  checkpoints.save(4, make_state(4))
  checkpoints.close()
  assert Checkpoints(directory).restore(make_state(0))[0] == 4
  for step in ("2", "4"):
    harm(which(directory / step))
  with pytest.raises(InputError, match="step 4 is damaged.*none before it is whole") as raised:
    Checkpoints(directory).restore(make_state(0))
  assert raised.value.path == directory / "4" and (directory / "4").exists()


def test_several_processes_move_what_two_starts_could_not_read(tmp_path, monkeypatch, caplog):
  saved(tmp_path / "checkpoints", [2, 4])
  cut(largest_file(tmp_path / "checkpoints/4"))
  monkeypatch.setattr(hosts, "process_count", lambda: 2)
  monkeypatch.setattr(hosts, "first_says", lambda make: make())
  monkeypatch.setattr(hosts, "barrier", lambda name: None)
  for _ in range(2):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(hosts.LostError, match="step 4 is damaged.*Start again: start 3 goes on from the one before"):
      checkpoints.restore(make_state(0))
    assert checkpoints.steps() == [2, 4]
  assert Checkpoints(tmp_path / "checkpoints").restore(make_state(0))[0] == 2
  assert "no start could read the checkpoint of step 4" in caplog.text
  assert os.listdir(tmp_path / "checkpoints.damaged") == ["4"]
  cut(largest_file(tmp_path / "checkpoints/2"))
  for _ in range(3):  # the only one stays
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    with pytest.raises(hosts.LostError, match="step 2 is damaged.*or remove this directory"):
      checkpoints.restore(make_state(0))
    assert checkpoints.steps() == [2]


def test_other_shapes_are_not_called_damage(tmp_path):
  saved(tmp_path, [4])
  like = {**make_state(0), "prompt": jnp.zeros((8, 96))}
  with pytest.raises(InputError, match=r"prompt.*\[64, 96\].*\[8, 96\]"):
    Checkpoints(tmp_path).restore(like)


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
