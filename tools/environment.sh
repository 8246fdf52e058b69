# shellcheck shell=bash
# The project's Python environment, for quickstart.sh and check.sh, which source this file.
# ensure_environment [EXTRA] makes .venv or completes it, and does nothing when it is already what setup.cfg and
# constraints.txt ask for. What the user must mend is said in one sentence, with exit code 2.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
PYTHON_BEST=(python3 python3.14 python3.13 python3.12 python3.11)
NEEDED_MB=6000 # a CPU torch takes a third of this, a CUDA torch most of it
UPDATE_MB=500  # an installation that was complete once

unset PYTHONHOME PYTHONPATH # another environment's packages must not shine through

say() { printf '%s\n' "$*" >&2; }

stop() {
    say "$(basename "$0" .sh): $*"
    exit 2
}

# The first interpreter that is new enough and can make a venv; PYTHON names another.
find_python() {
    local candidate recent=
    for candidate in ${PYTHON:+"$PYTHON"} "${PYTHON_BEST[@]}"; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        recent=${recent:-$candidate}
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    if [[ -n $recent ]]; then
        recent=$("$recent" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
        stop "python3-venv is missing: sudo apt install $recent-venv, then run this again"
    fi
    stop "found $(python3 --version 2>/dev/null || echo 'no python3'), wanted Python 3.11 or later: install it" \
        "(sudo apt install python3.12 python3.12-venv), then run this again"
}

# Whether .venv runs, is new enough, was not cut off in the making, and was made at this very place.
venv_is_whole() {
    [[ ! -e $VENV/.unfinished ]] || return 1
    "$VENV/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || return 1
    ! grep -q '^command = ' "$VENV/pyvenv.cfg" || grep -q "^command = .* $VENV\$" "$VENV/pyvenv.cfg"
}

# What an installation depends on; the same text means there is nothing to do.
wanted_stamp() {
    local python=$1
    "$python" - "$ROOT" <<'PYTHON'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
files = [root / name for name in ("setup.cfg", "pyproject.toml", "constraints.txt")]
print(hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest(), sys.version.split()[0], root)
PYTHON
}

require_disk() {
    local needed_mb=$1 free_mb
    free_mb=$(df -Pm "$ROOT" | awk 'NR == 2 { print $4 }')
    if ((free_mb < needed_mb)); then
        stop "found $free_mb MB free in $ROOT, wanted $needed_mb MB for the packages: free some space, then run this again"
    fi
}

# One changing line on a terminal, nothing in a log.
show_progress() {
    local line
    while read -r line; do
        if [[ -t 2 && $line =~ ^(Collecting|Downloading|Installing) ]]; then
            printf '\r\033[K  %.100s' "$line" >&2
        fi
    done
    if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi
}

install_project() {
    local extra=$1 log=$VENV/install.log
    if ! "$VENV/bin/python" -m pip install --no-input --disable-pip-version-check --progress-bar off \
        -c "$ROOT/constraints.txt" -e "$ROOT${extra:+[$extra]}" 2>"$log" | show_progress; then
        if grep -qi 'no space left' "$log"; then
            stop "the disk became full: free some space (about $NEEDED_MB MB are needed), then run this again"
        elif grep -qiE 'failed to establish|name resolution|unreachable|timed out|max retries|connection' "$log"; then
            stop "no network (pip could not reach its package index): connect, then run this again"
        elif grep -qi 'no matching distribution' "$log"; then
            stop "$(grep -i 'no matching distribution' "$log" | head -n 1) for $("$VENV/bin/python" --version):" \
                "remove .venv and set PYTHON to another interpreter, such as python3.12"
        fi
        stop "pip failed ($(grep -i error "$log" | tail -n 1)): see $log"
    fi
}

ensure_environment() {
    local extra=${1:-} stamp=$VENV/.installed python wanted
    if ! venv_is_whole; then
        python=$(find_python) || exit
        require_disk "$NEEDED_MB"
        if [[ -e $VENV ]]; then say ".venv is unfinished, broken or was moved here: making it again"; fi
        rm -rf "$VENV"
        mkdir "$VENV"
        touch "$VENV/.unfinished"
        "$python" -m venv "$VENV" >&2 || stop "$python could not make $VENV: see above, then run this again"
    fi
    wanted=$(wanted_stamp "$VENV/bin/python") || exit
    if grep -qxF -e "$wanted $extra" -e "$wanted dev" "$stamp" 2>/dev/null; then return; fi
    require_disk "$([[ -e $stamp ]] && echo "$UPDATE_MB" || echo "$NEEDED_MB")"
    say "installing the packages of constraints.txt into .venv (once; some minutes, most of them torch)"
    rm -f "$stamp"
    touch "$VENV/.unfinished"
    install_project "$extra"
    printf '%s %s\n' "$wanted" "$extra" >"$stamp"
    rm -f "$VENV/.unfinished"
}

# Two scripts at once must not fight over .venv: the second waits for the first (the lock is on the folder itself).
with_environment_locked() {
    (
        if command -v flock >/dev/null; then
            flock -n 9 || { say "waiting for another script that is at work on .venv" && flock 9; }
        fi
        "$@"
    ) 9<"$ROOT"
}
