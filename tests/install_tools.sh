#!/usr/bin/env bash
# Installs the programs that some tests run beside proxyserve: a browser, a proxy, Prometheus with promtool, and what
# makes certificates and reads systemd's units. Names may be given as arguments; without any, all. Does nothing where
# they are there already. Only on Debian and Ubuntu, as root; anywhere else it says what is missing and succeeds, and
# the tests that need it are skipped, visibly.
set -euo pipefail

declare -A PACKAGE=([nginx]=nginx-light [promtool]=prometheus [systemd-analyze]=systemd)
(($#)) || set -- chromium nginx promtool openssl systemd-analyze

missing=()
for tool in "$@"; do
  PATH="$PATH:/usr/sbin" command -v "$tool" >/dev/null || missing+=("${PACKAGE[$tool]:-$tool}")
done
((${#missing[@]})) || exit 0

if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
  echo "not installed: ${missing[*]}; tests that need them are skipped"
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# Without their services: tests start what they need, on ports of their own.
printf '#!/bin/sh\nexit 101\n' >/tmp/policy-rc.d.$$
if [ ! -e /usr/sbin/policy-rc.d ]; then
  install -m 755 /tmp/policy-rc.d.$$ /usr/sbin/policy-rc.d
  trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
rm -f /tmp/policy-rc.d.$$
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
