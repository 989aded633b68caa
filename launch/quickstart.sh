#!/usr/bin/env bash
# From a fresh machine to a measured retriever: environment, data, run. No hub, no GPU; ten to 25 minutes on 2 cores.
# launch/quickstart.sh [WORKDIR] [--config.a.b=v ...]; started again, it resumes. The data go to runs/docstrings.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment "${ENVIRONMENT:-.venv}"
workdir=runs/quickstart
if [[ $# -gt 0 && $1 != --* ]]; then
  workdir=$1
  shift
fi
python launch/docstrings.py --out=runs/docstrings
exec python -m dptdr_jax.main --config=configs/quickstart.py --workdir="$workdir" "$@"
