#!/usr/bin/env bash
# Puts Apache Kafka's jars into .venv/kafka and checks them against jars.sha256. Does nothing where they are.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
jars=$(cd "$here/../../.." && pwd)/.venv/kafka

are_right() {
  [[ -d $jars ]] && (cd "$jars" && sha256sum --check --strict --quiet "$here/jars.sha256")
}

are_right 2>/dev/null && exit 0
rm -rf "$jars"
mvn --quiet --batch-mode -f "$here/pom.xml" dependency:copy-dependencies \
  -DoutputDirectory="$jars" -DincludeScope=runtime
are_right || { echo "the jars of Kafka in $jars are not those of $here/jars.sha256" >&2; exit 1; }
