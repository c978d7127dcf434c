#!/usr/bin/env bash
# Create .venv if it is missing and install this package with the extras named: scripts/setup_venv.sh test,demo
# Installs again only when setup.py or the extras changed.
set -euo pipefail
cd "$(dirname "$0")/.."
extras="${1:-}"

if [ ! -x .venv/bin/python ]; then
    found=""
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            found=$candidate
            break
        fi
    done
    if [ -z "$found" ]; then
        echo "Python 3.11 or newer is missing. On Debian: apt-get install python3 python3-venv. Then run this again." >&2
        exit 2
    fi
    if ! "$found" -c 'import venv, ensurepip' 2>/dev/null; then
        echo "$found lacks its venv module. On Debian: apt-get install python3-venv. Then run this again." >&2
        exit 2
    fi
    "$found" -m venv .venv
fi

# byte code is written by what first imports a module: a run needs a fifth of what pip would compile in over a minute
compile=--no-compile
if [ -n "${PYTHONDONTWRITEBYTECODE:-}" ]; then compile=--compile; fi

wanted="$(cksum <setup.py) [$extras]"
stamp=.venv/.installed-$(printf %s "${extras:-core}" | tr -c 'a-z\n' -)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    echo "installing vlm${extras:+[$extras]} into .venv (some minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check $compile -e ".${extras:+[$extras]}"
    echo "$wanted" >"$stamp"
fi
