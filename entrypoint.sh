#!/usr/bin/env bash
# Starts one process of the platform:  entrypoint.sh ROLE
# Roles: postgres mail mlflow airflow-api scheduler dag-processor triggerer worker api ui
# Waits for what the role needs, then becomes it (exec), so that signals reach it.
# More than one word is a command, run in the same environment: entrypoint.sh neuroloop migrate. Airflow's Helm chart
# and its KubernetesExecutor start their containers so.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
[ ! -d "$here/.venv/bin" ] || PATH="$here/.venv/bin:$PATH"
# A container's user may be a number without a name; yoyo, which migrates the database, asks for one and breaks off.
export USER="${USER:-neuroloop}"
if [ $# -gt 1 ]; then
  exec "$@"
fi
[ "${1:-}" != serve ] || set -- api # what Amazon SageMaker calls it
python="$here/.venv/bin/python"
[ -x "$python" ] || python=$(command -v python3)
exec "$python" -m neuroloop.cli role "${1:?usage: entrypoint.sh ROLE, or a command of several words}"
