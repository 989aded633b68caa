"""Every script of launch/: shellcheck finds nothing, and without arguments they print their usage."""

import os
import pathlib
import shutil
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
def test_without_arguments_the_usage_is_printed(name):
  done = subprocess.run(["bash", str(LAUNCH / name)], capture_output=True, text=True)
  assert done.returncode == 2
  assert name in done.stderr.splitlines()[0] and "#" not in done.stderr


@pytest.mark.parametrize(
  ("arguments", "workdir", "rest"),
  [
    ([], "runs/quickstart", []),
    (["here"], "here", []),
    (["--config.seed=1"], "runs/quickstart", ["--config.seed=1"]),
    (["here", "--config.seed=1"], "here", ["--config.seed=1"]),
    (["--serve", "here"], "here", []),
  ],
)
def test_quickstart_writes_the_data_and_takes_a_directory_overrides_or_both(tmp_path, arguments, workdir, rest):
  (tmp_path / "launch").mkdir()
  shutil.copy(LAUNCH / "quickstart.sh", tmp_path / "launch")
  (tmp_path / "launch/environment.sh").write_text("make_environment() { :; }\n")
  (tmp_path / "python").write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
  (tmp_path / "python").chmod(0o755)
  environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
  script = ["bash", str(tmp_path / "launch/quickstart.sh"), *arguments]
  done = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
  main = ["-m", "dptdr_jax.main", "--config=configs/quickstart.py", f"--workdir={workdir}", *rest]
  serve = ["-m", "dptdr_jax.serve", f"--workdir={workdir}"] if "--serve" in arguments else []
  assert done.stdout.splitlines() == ["launch/docstrings.py", "--out=runs/docstrings", *main, *serve]
