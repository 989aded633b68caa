"""launch/gpus.sh, slurm.sh and tpu_pod.sh with fake executables: their calls, and what crashes, input errors,
preemptions and signals lead to."""

import signal
import time

import pytest

JOB = ("--config=configs/beir.py", "--workdir=/shared/my run", "--config.text.query_template=query: {text}")

SRUN = """
while [[ $1 == --* ]]; do shift; done
"$@"
"""
SCANCEL = 'kill -TERM "$(cat "$fakes/main-0.pid")"\n'

# A TPU of one worker, whose home is $fakes/home. `vm` and `queue` hold the states; a preemption takes both away.
GCLOUD = """
home=$fakes/home
case "$*" in
  *'tpu-vm describe'*) cat "$fakes/vm" ;;
  *'queued-resources describe'*) cat "$fakes/queue" ;;
  *'queued-resources create'*) echo READY >"$fakes/vm"; echo ACTIVE >"$fakes/queue" ;;
  *'queued-resources delete'*) rm -f "$fakes/vm" "$fakes/queue" ;;
  *'tpu-vm scp'*) cp "$5" "$home/" ;;
  *'tpu-vm ssh'*)
    for flag in "$@"; do case $flag in --command=*) command=${flag#*=} ;; esac; done
    cd "$home" && bash -c "$command" ;;
esac
"""
TPU = {"TPU": "pod", "ZONE": "z", "POLL": "0"}
ORDER = {"TYPE": "v5litepod-16", "VERSION": "v2-alpha-tpuv5-lite", "SPOT": "1"}
PREEMPT = "echo PREEMPTED >$fakes/vm; echo SUSPENDED >$fakes/queue; kill -KILL $$"


def test_gpus_restarts(fakes):
  fakes.python(["exit 1", "exit 0"])
  assert fakes.run("gpus.sh", *JOB)[0] == 0
  assert fakes.jobs() == ["python -m dptdr_jax.main " + " ".join(JOB)] * 2


def test_gpus_without_a_gpu_is_an_input_error(fakes):
  fakes.python(["exit 0"])
  fakes.tell("gpus", "1")
  status, printed = fakes.run("gpus.sh", *JOB)
  assert status == 2 and "jax finds no GPU" in printed and not fakes.jobs()


@pytest.fixture
def slurm(fakes):
  """Starts the batch script as SLURM does, in an allocation."""
  fakes.tool("srun", SRUN)
  fakes.tool("scancel", SCANCEL)
  fakes.tool("scontrol", "")
  place = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": ".", "SLURM_CPUS_PER_TASK": "8"}
  return lambda: fakes.start("slurm.sh", *JOB, **place)


def test_slurm_restarts_in_the_allocation_but_for_an_input_error(fakes, slurm):
  fakes.python(["exit 134", "exit 2"])
  status, printed = fakes.end(slurm())
  assert status == 2, printed
  assert len(fakes.calls("srun", "--kill-on-bad-exit=1 --cpus-per-task=8")) == len(fakes.jobs()) == 2
  assert not fakes.calls("scontrol")


def test_slurm_time_limit_saves_and_requeues(fakes, slurm):
  fakes.python(["hang"])
  status, printed = fakes.stop(slurm(), signal.SIGUSR1)
  assert status == 75, printed
  assert fakes.calls("scancel") == ["scancel --signal=TERM 7"]  # the tasks, not srun
  assert fakes.calls("scontrol") == ["scontrol requeue 7"]


def test_slurm_cancelled_job_is_not_requeued(fakes, slurm):
  fakes.python(["hang"])
  assert fakes.stop(slurm())[0] == 75
  assert len(fakes.jobs()) == 1 and not fakes.calls("scontrol")


@pytest.fixture
def tpu(fakes):
  """A function that makes a ready TPU of one worker, whose main job does the actions."""
  fakes.tool("gcloud", GCLOUD)
  environment = fakes.directory / "home/dptdr_jax/.venv/bin"
  environment.mkdir(parents=True)
  (environment / "activate").write_text(f"PATH={environment}:$PATH\n")

  def make(*actions: str) -> None:
    fakes.python(actions, path=environment / "python")
    fakes.tell("vm", "READY")

  return make


def test_tpu_copies_installs_runs_and_restarts(fakes, tpu):
  """The setup comes before the installation, which is done with the named Python; an input error is final."""
  tpu("exit 1", "exit 2")
  fakes.tool("my python", "[ -e ../mounted ]")
  named = {"PYTHON": str(fakes.bin / "my python"), "SETUP": "touch mounted; cd /  # and more"}
  status, printed = fakes.run("tpu_pod.sh", *JOB, **TPU, **named)
  assert status == 2, printed
  assert fakes.calls("my python", "version_info")
  assert fakes.jobs() == ["python -m dptdr_jax.main --coordinator=auto " + " ".join(JOB)] * 2
  assert fakes.calls("python", "pip install") and "[tpu]" in fakes.calls("python", "pip install")[0]
  assert (fakes.directory / "home/dptdr_jax/dptdr_jax/main.py").exists()
  assert len(fakes.calls("gcloud", "tpu-vm scp")) == 2 and not fakes.calls("gcloud", "create")


@pytest.mark.parametrize("fails", ["version", "pip"])
def test_tpu_failed_installation_is_final(fakes, tpu, fails):
  tpu("exit 0")
  if fails == "pip":
    fakes.tool("python", "exit 1", fakes.directory / "home/dptdr_jax/.venv/bin/python")
  fakes.tool("old", f"exit {int(fails == 'version')}")
  status, printed = fakes.run("tpu_pod.sh", *JOB, **TPU, PYTHON=str(fakes.bin / "old"))
  assert status == 2, printed
  assert len(fakes.calls("gcloud", "tpu-vm scp")) == 1 and not fakes.jobs()
  assert ("older than Python 3.11" in printed) == (fails == "version")


def test_tpu_lost_while_installing_or_failed_setup_is_tried_again(fakes, tpu):
  tpu()
  dies = '[ -e "$fakes/died" ] || { touch "$fakes/died"; kill -KILL $$; }\n'
  fakes.tool("python", dies, fakes.directory / "home/dptdr_jax/.venv/bin/python")
  status, printed = fakes.run("tpu_pod.sh", *JOB, **TPU, SETUP="[ -e tried ] || { touch tried; false; }")
  assert status == 0, printed
  assert len(fakes.calls("gcloud", "tpu-vm scp")) == 3 and len(fakes.jobs()) == 1


def test_tpu_gets_a_copy_of_a_config_outside_the_repository(fakes, tpu, tmp_path):
  tpu("exit 0", "exit 0")
  (tmp_path / "my own.py").write_text("def get_config(size): ...")
  assert fakes.run("tpu_pod.sh", f"--config={tmp_path}/my own.py:large", *JOB[1:], **TPU)[0] == 0
  assert "--coordinator=auto --config=given/my own.py:large --workdir" in fakes.jobs()[0]
  assert (fakes.directory / "home/dptdr_jax/given/my own.py").read_text().startswith("def get_config(size)")
  assert fakes.run("tpu_pod.sh", "--config=/mounted/there.py", *JOB[1:], **TPU)[0] == 0
  assert "--config=/mounted/there.py" in fakes.jobs()[1]


def test_tpu_is_not_ordered_for_a_missing_config(fakes, tpu):
  tpu("exit 0")
  status, printed = fakes.run("tpu_pod.sh", "--config=configs/bier.py", *JOB[1:], **TPU, **ORDER)
  assert status == 2 and "error: no such file: configs/bier.py" in printed and not fakes.calls("gcloud")


def test_tpu_preempted_is_ordered_again(fakes, tpu):
  tpu(PREEMPT, "exit 0")
  (fakes.directory / "vm").unlink()
  status, printed = fakes.run("tpu_pod.sh", *JOB, **TPU, **ORDER)
  assert status == 0, printed
  orders = fakes.calls("gcloud", "create")
  assert len(orders) == 2 and "pod --node-id=pod --accelerator-type=v5litepod-16" in orders[0] and "--spot" in orders[0]
  assert len(fakes.calls("gcloud", "delete pod --force")) == 1


def test_tpu_that_is_missing_without_an_order_is_an_input_error(fakes, tpu):
  tpu("exit 0")
  fakes.tell("vm", "STOPPED")
  status, printed = fakes.run("tpu_pod.sh", *JOB, **TPU)
  assert status == 2 and "set TYPE and VERSION" in printed and not fakes.jobs()


def test_tpu_ctrl_c_stops_the_workers(fakes, tpu):
  tpu("hang")
  started = time.monotonic()
  status, printed = fakes.stop(fakes.start("tpu_pod.sh", *JOB, **TPU), signal.SIGINT)
  assert status == 75, printed
  assert len(fakes.jobs()) == 1 and time.monotonic() - started < 30
  assert "while it is there it is paid for" in printed


def test_tpu_is_not_ordered_if_the_plan_does_not_fit(fakes, tpu):
  tpu("exit 0")
  fakes.python([])
  fakes.tell("plan", "1")
  status, _ = fakes.run("tpu_pod.sh", *JOB, **TPU, TOPOLOGY="v5e:4x4")
  plan = fakes.calls("python", "-m dptdr_jax.plan")
  assert status == 2 and not fakes.calls("gcloud")
  assert [call.partition("--")[2] for call in plan] == [f"topology=v5e:4x4 {JOB[0]} {JOB[2]}"]
