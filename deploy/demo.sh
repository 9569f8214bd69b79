#!/usr/bin/env bash
# A whole federation on one machine, step by step as docs/enrolment.md and README tell it: a
# coordinator behind nginx, three hospitals with folders and keys of their own, five rounds.
#   deploy/demo.sh [OUT]        OUT is runs/deploy-demo by default; it is made anew
# Everything listens on 127.0.0.1. Needs nginx.
set -euo pipefail
cd "$(dirname "$0")/.."
out="$(realpath -m "${1:-runs/deploy-demo}")"
bin="$PWD/.venv/bin"
PATH="${AGSSD_BIN:-$bin}:$PATH"
sites=(north coast valley)
# A demonstration's passphrase; a coordinator types a real one when asked, and keeps ca.key offline.
export AGSSD_CA_PASSPHRASE=demonstration-only

step() { printf '\n== %s\n' "$*"; }
started=()
stop_all() {
  for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done
  for pid in "${started[@]}"; do wait "$pid" 2>/dev/null || true; done
}
trap stop_all EXIT

if [ -e "$out" ] && [ ! -e "$out/.deploy-demo" ]; then
  echo "$out exists and is not of an earlier demonstration. Name another folder." >&2
  exit 2
fi
rm -rf "$out"
mkdir -p "$out"
touch "$out/.deploy-demo"
config=configs/deploy-demo.yaml

step "Coordinator: certificates, keys, a kit for each hospital"
agssd-server provision deploy/demo-federation.yaml --out "$out/federation"

step "Hospitals: scans into a site's folder (here they are invented)"
agssd-sim phantoms "$config" --out "$out/scans"
for site in "${sites[@]}"; do
  agssd-site index "$out/scans/$site" --modality "$([ "$site" = north ] && echo CT || echo MR)" --out "$out/$site"
  agssd-site prepare "$out/$site" --config "$config"
done

step "Hospitals: make keys from the kit; send keys/request.json to the coordinator"
for site in "${sites[@]}"; do
  agssd-site enrol "$out/federation/kits/$site.zip" --site "$out/$site"
done

step "Coordinator: admit them; send back the answers"
for site in "${sites[@]}"; do
  agssd-server admit "$out/$site/keys/request.json" --federation "$out/federation" --answer "$out/$site-answer.json"
done
agssd-server sites --federation "$out/federation"

step "Hospitals: put the keys into use, and decide what the site allows"
for site in "${sites[@]}"; do
  agssd-site enrol --answer "$out/$site-answer.json" --site "$out/$site"
  agssd-site policy init "$out/$site"
done

step "Coordinator: the round-0 checkpoint, and the server behind nginx"
agssd-sim init "$config" output="$out/runs"
agssd-server serve "$config" output="$out/runs" --federation "$out/federation" --listen 127.0.0.1:8443 &
server=$!
started+=("$server")

step "Hospitals: the check before the first day"
until (exec 3<>/dev/tcp/127.0.0.1/8443) 2>/dev/null; do
  kill -0 "$server" || exit 1
  sleep 0.5
done
for site in "${sites[@]}"; do
  agssd-site preflight --quick "$out/$site" --config "$config"
done

step "Hospitals: on line"
for site in "${sites[@]}"; do
  agssd-site run "$out/$site" > "$out/$site.log" 2>&1 &
  started+=("$!")
done
wait "$server"

step "Hospitals: the signed final checkpoint, and a page of curves and pictures for their own eyes"
for site in "${sites[@]}"; do
  agssd-site fetch deploy-demo "$out/$site" --out "$out/$site-encoder"
  agssd-site report "$out/$site"
done

step "The rounds, and the journals of both sides"
agssd-server rounds "$out/runs/deploy-demo"
agssd-server journal verify "$out/federation"
for site in "${sites[@]}"; do
  agssd-site journal verify "$out/$site"
done
step "Done: $out/runs/deploy-demo/report.html at the coordinator, $out/north/report.html at a hospital"
