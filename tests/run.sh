#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them; skipped tests are counted and named at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
. ./setup.sh requirements.txt tests/requirements.txt
exec "$PYTHON" -m pytest -q -rs tests "$@"
