#!/usr/bin/env bash
# Environment, lint, tests: what CI runs, from a fresh clone. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment "${ENVIRONMENT:-.venv-test}" "[test]"
# The search page is tested in a browser: Debian's, if there is none. Only who cannot install one skips those tests.
if ! command -v chromium > /dev/null && command -v apt-get > /dev/null && [[ $(id -u) == 0 ]]; then
  apt-get update -qq
  apt-get install -qq -y --no-install-recommends chromium > /dev/null
fi
ruff check .
ruff format --check .
# Compilation allocates and frees memory all the time; keep what the system has given.
export MALLOC_TOP_PAD_=268435456 MALLOC_TRIM_THRESHOLD_=2000000000
# Two workers; a file stays in one of them, which shares its fixtures; in the order of tests/conftest.py.
exec python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder "$@"
