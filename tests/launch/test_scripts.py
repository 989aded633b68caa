"""Every script of launch/: shellcheck has nothing to say, and without arguments they tell their usage."""

import pathlib
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


def test_shellcheck():
  shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
  done = subprocess.run([shellcheck, "-x", *SCRIPTS], cwd=LAUNCH.parent, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["restart.sh", "local_cluster.sh", "gpus.sh", "slurm.sh", "tpu_pod.sh"])
def test_without_arguments_the_usage(name):
  done = subprocess.run(["bash", str(LAUNCH / name)], capture_output=True, text=True)
  assert done.returncode == 2
  assert name in done.stderr.splitlines()[0] and "#" not in done.stderr
