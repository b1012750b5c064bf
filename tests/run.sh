#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them, one file a process and two at a time (the tiny models gain little from a
# second thread); skipped tests are counted and named at the end. Flags are pytest's: bash tests/run.sh -n 0 tests/test_grpo.py
set -euo pipefail
cd "$(dirname "$0")/.."
. ./setup.sh requirements.txt tests/requirements.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
[ $# -gt 0 ] || set -- tests
exec "$PYTHON" -m pytest -q -rs -n 2 --dist loadgroup --no-loadscope-reorder "$@"
