# Sourced by cycle.sh and tests/run.sh, with requirements files as arguments. Sets PYTHON, unless it is set,
# to the one of .venv. That is made if it is missing, and the requirements are installed into it once.
if [ -z "${PYTHON:-}" ]; then
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "Python 3.11 or later is needed"; exit 2; }
  [ -x .venv/bin/pip ] || { echo "making .venv"; python3 -m venv .venv; }
  PYTHON=$PWD/.venv/bin/python
  stamp=.venv/installed-$(cat "$@" | cksum | cut -d' ' -f1)
  if [ ! -e "$stamp" ]; then
    echo "installing $*"
    for file in "$@"; do "$PYTHON" -m pip install -q --disable-pip-version-check -r "$file"; done
    touch "$stamp"
  fi
fi
# LAUNCH="accelerate launch ..." finds the same environment.
PATH=$(dirname "$(command -v "$PYTHON")"):$PATH
