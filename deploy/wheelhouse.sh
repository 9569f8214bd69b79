#!/usr/bin/env bash
# Everything that pip needs to install this software on a machine without a network.
#   deploy/wheelhouse.sh OUT [EXTRA...]      extras: tracking, research; none for a hospital
# Run it where the network is, with the Python version, processor and system of the target:
# packages with compiled parts are fetched for this machine. Then, over there:
#   sha256sum --check SHA256SUMS
#   python3 -m venv /opt/agssd
#   /opt/agssd/bin/pip install --no-index --find-links . agssd-federation
set -euo pipefail
if [ $# -lt 1 ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
mkdir -p "$1"
out="$(cd "$1" && pwd)"
shift
cd "$(dirname "$0")/.."
extras="$(IFS=,; echo "$*")"
python="${PYTHON:-python3}"
pip=("$python" -m pip --disable-pip-version-check)

# torch by its exact version first, as in the Makefile: a range could bring another build.
"${pip[@]}" download --quiet --dest "$out" "$(grep '^torch==' constraints.txt)" -c constraints.txt
"${pip[@]}" wheel --quiet --no-deps --wheel-dir "$out" .
"${pip[@]}" download --quiet --dest "$out" --find-links "$out" -c constraints.txt \
  "agssd-federation${extras:+[$extras]}"
cd "$out"
rm -f SHA256SUMS
sha256sum -- * >SHA256SUMS.tmp
mv SHA256SUMS.tmp SHA256SUMS
"$python" - "$(wc -l <SHA256SUMS)" "$(du -sh . | cut -f1)" <<'PY'
import sys
print(f"{sys.argv[1]} packages, {sys.argv[2]}; for Python {sys.version_info[0]}.{sys.version_info[1]}")
PY
