#!/usr/bin/env bash
# From a clone to a scaling law: makes .venv, trains the quickstart ladder on real text, prints where the report is.
# Needs python3 (3.11 or later) with venv. Run it again after anything; what is finished is not repeated.
# Arguments go to `homelab run`.
set -euo pipefail
# shellcheck source=tools/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

cd "$ROOT"
with_environment_locked ensure_environment
exec "$VENV/bin/homelab" run recipes/ladders/quickstart.toml "$@"
