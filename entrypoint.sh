#!/usr/bin/env bash
# Starts one process of the platform:  entrypoint.sh ROLE
# Roles: postgres mail mlflow airflow-api scheduler dag-processor triggerer worker api ui
# Waits for what the role needs, then becomes it (exec), so that signals reach it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python="$here/.venv/bin/python"
[ -x "$python" ] || python=$(command -v python3)
exec "$python" -m neuroloop.cli role "${1:?usage: entrypoint.sh ROLE}"
