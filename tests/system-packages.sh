#!/bin/sh
# Installs what some tests need from the system, where that is possible without asking; otherwise those tests skip.
command -v chromium >/dev/null 2>&1 && exit 0
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1 || exit 0
(apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium) >/dev/null 2>&1 ||
    echo "note: chromium could not be installed; the browser test of the report will skip" >&2
