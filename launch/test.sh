#!/usr/bin/env bash
# Environment, lint, tests: what CI runs, from a fresh clone. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment "${ENVIRONMENT:-.venv-test}" "[test]"
ruff check .
ruff format --check .
exec python -m pytest "$@"
