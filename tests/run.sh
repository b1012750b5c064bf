#!/usr/bin/env bash
# Installs what the tests need into .venv, checks the format and style, runs all tests. Arguments go to pytest
# and skip the check: bash tests/run.sh -n 0 tests/test_grpo.py
#
# Two processes run one test file each, with one thread: the tiny models gain little from a second thread.
# Skipped tests are counted and named at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
. ./setup.sh requirements.txt tests/requirements.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ $# -eq 0 ]; then
  "$PYTHON" -m ruff format --check .
  "$PYTHON" -m ruff check .
  set -- tests
fi
exec "$PYTHON" -m pytest -q -rs -n 2 --dist loadgroup --no-loadscope-reorder "$@"
