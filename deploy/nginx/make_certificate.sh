#!/usr/bin/env bash
# Makes a self-signed certificate for trying out, valid for a year, beside this script in site/:
#   deploy/nginx/make_certificate.sh [NAME…]      names and addresses of this server; localhost by default
# Overwrites nothing. For production put a real pair into the same two files.
set -euo pipefail

folder=${PHOENIX_SITE:-$(dirname "$0")/site}
certificate=$folder/certificate.pem key=$folder/certificate.key
for file in "$certificate" "$key"; do
  if [[ -e $file ]]; then
    echo "$file is there already; remove it first if you want another" >&2
    exit 1
  fi
done

names=("$@")
((${#names[@]})) || names=(localhost 127.0.0.1)
subjects=()
for name in "${names[@]}"; do
  if [[ $name =~ ^[0-9.]+$ || $name == *:* ]]; then subjects+=("IP:$name"); else subjects+=("DNS:$name"); fi
done

umask 077 # the key is for its owner alone
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 365 -subj "/CN=${names[0]}" \
  -addext "subjectAltName=$(IFS=,; echo "${subjects[*]}")" -keyout "$key" -out "$certificate" 2>/dev/null ||
  { rm -f "$key" "$certificate"; echo "openssl could not make a certificate for ${names[*]}" >&2; exit 1; }
chmod 644 "$certificate"
echo "$certificate, for ${names[*]}: clients trust it with --cacert $certificate"
