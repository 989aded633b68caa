#!/usr/bin/env bash
# Environment, lint, tests: what CI runs, from a fresh clone. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment "${ENVIRONMENT:-.venv-test}" "[test]"
ruff check .
ruff format --check .
# Compilers ask for memory and give it back all the time: what the system has given stays with the process.
export MALLOC_TOP_PAD_=268435456 MALLOC_TRIM_THRESHOLD_=2000000000
# Two at a time, a file in one process: its fixtures are dear; in the order of tests/conftest.py.
exec python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
