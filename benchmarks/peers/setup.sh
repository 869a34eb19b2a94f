#!/usr/bin/env bash
# Make benchmarks/peers/.venv with the tools that tl is compared with: 5 minutes, about 6 GB.
#   benchmarks/peers/setup.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")"
"${1:-python3.11}" -m venv .venv
.venv/bin/python -m pip install --disable-pip-version-check --progress-bar off --quiet -r requirements.txt
.venv/bin/python -c 'import accelerate, datasets, fastai, pytorch_lightning, sklearn, timm, transformers'
echo "ready: benchmarks/peers/.venv"
