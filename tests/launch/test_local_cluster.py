"""launch/local_cluster.sh with scripted processes; real ones: tests/faults/test_two_processes.py."""

import signal

import pytest


def arguments(tmp_path, *, processes=2):
  return "local_cluster.sh", str(processes), "--", "--config=c.py", f"--workdir={tmp_path}/work"


def test_processes_get_one_coordinator_and_logs(fakes, tmp_path):
  fakes.python(["echo $XLA_FLAGS; exit 0"], ["exit 0"])
  status, printed = fakes.run("local_cluster.sh", "2", "3", "--", "--config=c.py", f"--workdir={tmp_path}/work")
  assert status == 0, printed
  first, second = sorted(fakes.jobs())
  places = [call.partition(f"--workdir={tmp_path}/work ")[2].split() for call in (first, second)]
  assert places[0][0].startswith("--coordinator=localhost:") and places[0][:2] == places[1][:2]
  assert [place[1:] for place in places] == [["--processes=2", f"--process={index}"] for index in range(2)]
  logs = [(tmp_path / f"work/logs/process-{index}.log").read_text() for index in range(2)]
  assert "process 0 does" in logs[0] and "process 1 does" in logs[1]
  assert "process 0 does" in printed and "process 1 does" not in printed
  assert "--xla_force_host_platform_device_count=3" in printed


def test_one_process_gets_no_coordinator(fakes, tmp_path):
  fakes.python(["exit 0"])
  assert fakes.run(*arguments(tmp_path, processes=1))[0] == 0
  assert "--coordinator" not in fakes.jobs()[0]


@pytest.mark.parametrize("death", ["kill -KILL $$", "exit 1", "exit 75"])
def test_death_of_one_restarts_all(fakes, tmp_path, death):
  fakes.python(["deaf", "exit 0"], [death, "exit 0"])  # deaf: it hangs, waiting for the dead one
  status, printed = fakes.run(*arguments(tmp_path), GRACE="1")
  assert status == 0, printed
  assert len(fakes.jobs()) == 4
  ports = [call.split("--coordinator=")[1].split()[0] for call in fakes.jobs()]
  assert len(set(ports[:2])) == len(set(ports[2:])) == 1


def test_input_error_in_any_process_is_final(fakes, tmp_path):
  fakes.python(["trap '' TERM; sleep 0.5; exit 2"], ["exit 134"])  # the second one notices that the first is leaving
  status, printed = fakes.run(*arguments(tmp_path))
  assert status == 2, printed
  assert len(fakes.jobs()) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_all(fakes, tmp_path, number):
  fakes.python(["hang"], ["deaf"])
  status, printed = fakes.stop(fakes.start(*arguments(tmp_path), GRACE="1"), number, processes=2)
  assert status == 75, printed
  assert len(fakes.jobs()) == 2


@pytest.mark.parametrize("bad", [["2"], ["0", "--", "--workdir=x"], ["2", "--", "--config=c.py"], ["2", "--workdir=x"]])
def test_wrong_arguments(fakes, bad):
  status, printed = fakes.run("local_cluster.sh", *bad)
  assert status == 2 and printed.startswith("launch/local_cluster.sh PROCESSES")
