#!/bin/sh
# Make the environment that the peer, kvpress, is measured in: its own transformers, the project's torch.
#
#     sh benchmarks/engine/make_peer_env.sh [folder, .venv-peer by default]
#
# kvpress 0.5.5 needs transformers below 5.3, which kvsieve does not run on, so the two never share a process.
set -eu

ROOT=$(cd "$(dirname "$0")/../.." && pwd)
ENV=${1:-"$ROOT/.venv-peer"}
PYTHON=${PYTHON:-python3}

rm -f "$ENV/.installed"
"$PYTHON" -m venv "$ENV"
grep '^torch==' "$ROOT/constraints.txt" > "$ENV/constraints.txt"
"$ENV/bin/python" -m pip install --progress-bar on -c "$ENV/constraints.txt" "kvpress==0.5.5" "transformers==5.2.0"
"$ENV/bin/python" -c "import kvpress, torch, transformers; print('torch', torch.__version__, 'transformers', transformers.__version__)"
touch "$ENV/.installed"
