#!/usr/bin/env bash
# From a fresh machine to a measured retriever: environment, data, run. No hub, no GPU; six minutes on 2 cores after the installation.
# launch/quickstart.sh [--serve] [WORKDIR] [--config.a.b=v ...]; started again, it resumes. The data go to
# runs/docstrings. With --serve it ends with a search page at http://127.0.0.1:8000, until Ctrl-C.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
serve=
if [[ ${1:-} == --serve ]]; then
  serve=yes
  shift
fi
make_environment "${ENVIRONMENT:-.venv}" "${serve:+[serve]}"
workdir=runs/quickstart
if [[ $# -gt 0 && $1 != --* ]]; then
  workdir=$1
  shift
fi
python launch/docstrings.py --out=runs/docstrings
run=(python -m dptdr_jax.main --config=configs/quickstart.py --workdir="$workdir" "$@")
[[ $serve ]] || exec "${run[@]}"
"${run[@]}"
exec python -m dptdr_jax.serve --workdir="$workdir"
