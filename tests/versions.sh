#!/usr/bin/env bash
# Runs the notebook on its sample and the tests with other versions of Python and of the packages.
#
# usage: tests/versions.sh [python3.10] [lowest-direct | highest]
#
# lowest-direct takes the oldest versions that requirements.txt and tests/requirements.txt allow, highest the
# newest. It takes 7 GB of disk and, on one core, three quarters of an hour. The oldest PyTorch cannot pretend
# to have CUDA, so that tests/test_cuda.py is skipped there.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3.10}
resolution=${2:-lowest-direct}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"$python" -m venv "$place/env"
"$place/env/bin/pip" install --quiet uv
export PATH="$place/env/bin:$PATH"
uv pip install --python "$place/env/bin/python" --resolution "$resolution" \
    -r requirements.txt -r tests/requirements.txt
uv pip freeze --python "$place/env/bin/python"
(cd "$place" && papermill "$OLDPWD/main.ipynb" executed.ipynb --stdout-file -)
pytest tests -n 2
