#!/usr/bin/env bash
# Installs the servers that the tests talk to, Redis, PostgreSQL, nginx and Prometheus, the Java for Kafka, the curl that the
# tutorial types, the docker-compose that reads compose.yaml (no container engine is needed for that), and a library
# that NVIDIA's perf_analyzer is linked against, from Debian's or Ubuntu's packages.
# Does nothing where they are. Nothing is left running: tests start servers of their own.
set -euo pipefail

missing=()
command -v redis-server >/dev/null || missing+=(redis-server)
compgen -G '/usr/lib/postgresql/*/bin/postgres' >/dev/null || command -v postgres >/dev/null ||
  missing+=(postgresql)
command -v curl >/dev/null || missing+=(curl)
# Debian keeps nginx where only root looks.
[[ -x /usr/sbin/nginx ]] || command -v nginx >/dev/null || missing+=(nginx-light)
command -v prometheus >/dev/null || missing+=(prometheus)
command -v docker-compose >/dev/null || missing+=(docker-compose)
command -v openssl >/dev/null || missing+=(openssl)
# Kafka's jars come by Maven: tests/support/kafka/install.sh.
command -v java >/dev/null || missing+=(openjdk-17-jre-headless)
command -v mvn >/dev/null || missing+=(maven)
# perf_analyzer itself comes from PyPI, for this one architecture: tests/support/perf_analyzer.py.
[[ $(uname -m) != x86_64 || -e /usr/lib/x86_64-linux-gnu/libb64.so.0d || -e /usr/lib64/libb64.so.0d ]] ||
  missing+=(libb64-0d)
if ((${#missing[@]} == 0)); then
  exit 0
fi

as_root=()
if ((EUID != 0)); then
  as_root=(sudo -n)
fi
if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true 2>/dev/null; then
  echo "The tests need ${missing[*]}, and this script may not install packages here. Run:" >&2
  echo "  sudo apt-get update && sudo apt-get install -y --no-install-recommends ${missing[*]}" >&2
  exit 1
fi

# Debian starts a service as soon as its package is installed, on ports a developer may use himself.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
  trap '"${as_root[@]}" rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee "$policy" >/dev/null
  "${as_root[@]}" chmod 755 "$policy"
fi

"${as_root[@]}" apt-get update -q
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
  apt-get install -q -y --no-install-recommends "${missing[@]}"

# They were not here before, so nobody waits for them at the next boot.
if [[ -d /run/systemd/system ]]; then
  for package in "${missing[@]}"; do
    case $package in
      redis-server | postgresql | prometheus) "${as_root[@]}" systemctl disable --quiet "$package" ;;
      nginx-light) "${as_root[@]}" systemctl disable --quiet nginx ;;
    esac
  done
fi
