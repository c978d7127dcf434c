#!/usr/bin/env bash
# Find Chromium for the tests of the browser chat; as root on Debian, install it. Without one those tests are skipped.
set -euo pipefail
if command -v chromium >/dev/null || command -v chromium-browser >/dev/null; then
    exit 0
fi
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing Chromium for the browser tests"
    install=(env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends chromium)
    if "${install[@]}" >/dev/null 2>&1 || { apt-get update -qq && "${install[@]}"; } >/dev/null 2>&1; then
        exit 0
    fi
fi
echo "Chromium is missing: the browser tests are skipped. On Debian: apt-get install chromium" >&2
