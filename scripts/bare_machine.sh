#!/usr/bin/env bash
# Prove the README's two commands where only Debian's python3, python3-venv and make are installed: make a root folder
# of Debian's own packages, clone this repository's HEAD into it, and there `make serve`, a request, and `make test`.
#
#   sudo scripts/bare_machine.sh [serve|test]...     both when none is named
#
# Needs root, debootstrap and unshare. Environment: SUITE (bookworm), MIRROR (the host's).
set -euo pipefail
cd "$(dirname "$0")/.."
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
mirror=${MIRROR:-$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
  sed -n 's/^URIs: *//p; s/^deb \([^ ]*\).*/\1/p' | head -1 || true)}
root=$(mktemp -d) && chmod 755 "$root" # as a root folder is: PostgreSQL of the tests runs as another user
server=
# unshare hears no SIGTERM itself; killed, it takes its whole machine with it
trap '[ -z "$server" ] || kill -KILL $server 2>/dev/null || true; wait; rm -rf --one-file-system "$root"' EXIT

debootstrap --variant=minbase --include=python3,python3-venv,make,ca-certificates \
  "${SUITE:-bookworm}" "$root" ${mirror:+"$mirror"} >/dev/null
cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
cp -L /etc/resolv.conf "$root/etc/"
echo "127.0.0.1 localhost" >"$root/etc/hosts"
mkdir "$root/home/fraud"
git archive HEAD | tar -x -C "$root/home/fraud"
echo "a machine of $(chroot "$root" dpkg-query -f '.\n' -W | wc -l) packages: $(chroot "$root" python3 --version), no compiler, no libgomp1"
chroot "$root" dpkg-query -W libgomp1 gcc 2>/dev/null && { echo "it has more than it should"; exit 1; }

inside() { # a command in the repository, with the machine's own processes and mounts; its first process passes SIGTERM on
  exec unshare --mount --pid --fork --kill-child chroot "$root" /bin/sh -c "
    mount -t proc proc /proc && mount -t devtmpfs dev /dev 2>/dev/null || mknod -m 666 /dev/null c 1 3 2>/dev/null
    mount -t tmpfs shm /dev/shm 2>/dev/null || true
    cd /home/fraud && trap 'kill -TERM \$!' TERM
    env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_CERT=/etc/ssl/certs/ca-certificates.crt $* &
    wait \$! && status=0 || status=\$?
    while kill -0 \$! 2>/dev/null; do wait \$! && status=0 || status=\$?; done
    exit \$status"
}

for what in "${@:-serve test}"; do
  for command in $what; do
    started=$(date +%s)
    if [ "$command" = test ]; then
      (inside make test)
    else
      inside make serve PORT="$port" &
      server=$!
      until python3 -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$port/readyz', timeout=2)" 2>/dev/null; do
        kill -0 $server || { echo "make serve ended before it was ready"; exit 1; }
        sleep 1
      done
      echo "make serve: ready after $(($(date +%s) - started)) s"
      python3 - "$port" <<'REQUEST'
import json, sys, time, urllib.request
instance = {"transaction_id": "bare-1", "event_time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "customer_id": "c000001", "merchant_id": "m000001", "amount": 12.5, "category": "grocery", "channel": "chip",
            "device_id": "d1", "latitude": 48.1, "longitude": 11.6, "merchant_latitude": 48.1, "merchant_longitude": 11.6,
            "account_age_days": 100, "strong_authentication": True, "card_type": "debit"}
request = urllib.request.Request(f"http://127.0.0.1:{sys.argv[1]}/predict", json.dumps({"instances": [instance]}).encode(),
                                 {"Content-Type": "application/json"})
print("answered:", json.dumps(json.load(urllib.request.urlopen(request))["predictions"][0]))
REQUEST
      stopping=$(date +%s)
      pkill -TERM -P $server
      while kill -0 $server 2>/dev/null; do
        [ $(($(date +%s) - stopping)) -lt 30 ] || { echo "make serve goes on 30 s after SIGTERM"; exit 1; }
        sleep 0.2
      done
      echo "make serve: ended $(($(date +%s) - stopping)) s after SIGTERM"
      server=
    fi
    echo "make $command: done in $(($(date +%s) - started)) s"
  done
done
