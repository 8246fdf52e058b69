#!/usr/bin/env bash
# Format, lint, types and tests, in that order; stops at the first that fails. `tools/check.sh fast` leaves the slow
# tests out. Makes or completes .venv first. The last lines are pytest's own.
set -euo pipefail
# shellcheck source=tools/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [[ $# -gt 1 || ${1:-fast} != fast ]]; then stop "found '$*', wanted nothing or 'fast'"; fi

cd "$ROOT"
export OMP_NUM_THREADS=1 # several processes share the cores
SECONDS=0

stage() {
    local name=$1 started=$SECONDS
    shift
    say "== $name"
    "$@" || {
        local code=$?
        say "== $name failed after $((SECONDS - started)) s"
        exit "$code"
    }
    say "== $name passed, $((SECONDS - started)) s"
}

python() { "$VENV/bin/python" "$@"; }

# mypy cannot see through the editable mapping of tools/ and recipes/ into the package, so it gets the tree as installed.
check_types() {
    local tree=$ROOT/.mypy_cache/tree
    rm -rf "$tree"
    mkdir -p "$tree/homelab_scaling"
    ln -s "$ROOT"/homelab_scaling/* "$ROOT/tools" "$ROOT/recipes" "$tree/homelab_scaling/"
    (cd "$tree" && python -m mypy --config-file "$ROOT/pyproject.toml" --cache-dir "$ROOT/.mypy_cache" -p homelab_scaling)
}

say "== environment"
with_environment_locked ensure_environment dev
stage format python -m ruff format --check .
stage lint python -m ruff check .
stage shell "$VENV/bin/shellcheck" -x tools/*.sh .ci/run
stage types check_types
stage "fast tests" python -m pytest -q -m "not slow" -n 3 # more than cores: many of them wait for processes
if [[ ${1:-} == fast ]]; then exit; fi
say "== slow tests"
# Most of their time is start-up of processes; files stay whole because some share a cluster, a wheel or a lab.
exec "$VENV/bin/python" -m pytest -q -m slow -n 3 --dist loadfile
