#!/usr/bin/env bash
# Builds the Dockerfile and asks the image for a real answer, without a container daemon and
# without an image registry: buildah, in a chroot, on a stand-in base made by debootstrap.
# Needs root, buildah and debootstrap (Debian packages). BASE=IMAGE builds on a real base instead.
#
# The stand-in base gets this machine's CA bundle and pip settings; folders that pip is told to
# look for wheels in are there, read-only, while the image is built, and not in it.
set -euo pipefail
cd "$(dirname "$0")/.."
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
IMAGE=${IMAGE:-localhost/trunkline:test}
WORK=$(mktemp -d)
PORT=${PORT:-8765}
SERVER=
trap '[ -z "$SERVER" ] || kill -KILL "$SERVER" 2>/dev/null || true
      umount "$WORK/root/proc" "$WORK/root/dev" "$WORK/root" 2>/dev/null || true
      rm -rf "$WORK"' EXIT

say() { echo "image-test: $*"; }

for tool in buildah debootstrap; do
  command -v "$tool" >/dev/null || { say "$tool is needed: apt-get install $tool"; exit 1; }
done
[ "$(id -u)" = 0 ] || { say "needs root"; exit 1; }

stand_in_base() {
  local name=localhost/stand-in:bookworm
  if ! buildah inspect --type image "$name" >/dev/null 2>&1; then
    say "making a stand-in base of Debian bookworm" >&2
    debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates \
      bookworm "$WORK/base" >"$WORK/debootstrap.log" || { tail "$WORK/debootstrap.log" >&2; exit 1; }
    cp /etc/ssl/certs/ca-certificates.crt "$WORK/base/etc/ssl/certs/ca-certificates.crt"
    python3 -m pip config list 2>/dev/null | sed -n "s/^[a-z:]*env[a-z:]*\.//p; s/^global\.//p" |
      sort -u -t= -k1,1 | grep -v '^constraint=' | sed "s/='\(.*\)'$/ = \1/; 1i [global]" \
      >"$WORK/base/etc/pip.conf"
    local container; container=$(buildah from scratch)
    buildah add --quiet "$container" "$WORK/base" / >/dev/null
    buildah commit --quiet "$container" "$name" >/dev/null
    buildah rm "$container" >/dev/null
    rm -rf "$WORK/base"
  fi
  echo "$name"
}

BASE=${BASE:-$(stand_in_base)}
VOLUMES=()
for folder in $(python3 -m pip config list 2>/dev/null | grep -oE "(file://)?/[^ ']+" | sed 's#^file://##; s#/simple$##' | sort -u); do
  [ -d "$folder" ] && VOLUMES+=(--volume "$folder:$folder:ro")
done

say "building $IMAGE on $BASE"
buildah bud --quiet --format docker --network host --build-arg "BASE=$BASE" "${VOLUMES[@]}" \
  --build-arg "DEVICE=${DEVICE:-cpu}" ${TARGET:+--target "$TARGET"} --tag "$IMAGE" . >/dev/null

# What the image is set to do, as a daemon would read it.
config=$(buildah inspect --type image "$IMAGE")
python3 - "$config" <<'PYTHON'
import json, sys
config = json.loads(sys.argv[1])["Docker"]["config"]
assert config["User"] == "10001:10001", config["User"]
assert config["Entrypoint"] == ["trunkline"] and config["Cmd"] == ["serve"], config
assert "/data" in config["Volumes"], config["Volumes"]
assert "/ready" in " ".join(config["Healthcheck"]["Test"]), config["Healthcheck"]
PYTHON

container=$(buildah from "$IMAGE")
root=$(buildah mount "$container")
say "size: $(du -sm --apparent-size "$root" | cut -f1) MB, of it torch $(du -sm --apparent-size "$root"/opt/trunkline/lib/python3*/site-packages/torch | cut -f1) MB, the base $(du -sm --apparent-size --exclude=opt "$root" | cut -f1) MB"
for tool in gcc g++ cc make; do
  [ ! -e "$root/usr/bin/$tool" ] || { say "the image has a build tool: $tool"; exit 1; }
done

# Run it as a daemon would: its user, a root that can't be written, one volume.
mkdir "$WORK/root" "$WORK/data"
chown 10001:10001 "$WORK/data"
mount --bind "$root" "$WORK/root"
mount --bind "$WORK/data" "$WORK/root/data"
mount -o remount,bind,ro "$WORK/root"
mount --rbind /dev "$WORK/root/dev"
mount -t proc proc "$WORK/root/proc"
trap '[ -z "$SERVER" ] || kill -KILL "$SERVER" 2>/dev/null || true
      umount -R "$WORK/root" || true
      buildah rm "$container" >/dev/null
      rm -rf "$WORK"' EXIT
settings=$(python3 -c "import json,sys
for pair in json.loads(sys.argv[1])['Docker']['config']['Env']: print(pair)" "$config")
mapfile -t environment <<<"$settings"
in_image() {
  env -i "${environment[@]}" chroot --userspec=10001:10001 "$WORK/root" "$@"
}
if in_image touch /written 2>/dev/null; then say "the root can be written"; exit 1; fi
env -i "${environment[@]}" "TRUNKLINE_HOST=127.0.0.1" "TRUNKLINE_PORT=$PORT" \
  chroot --userspec=10001:10001 "$WORK/root" trunkline serve >"$WORK/server.log" 2>&1 &
SERVER=$!
for _ in $(seq 600); do
  in_image python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:$PORT/ready')" \
    2>/dev/null && break
  kill -0 "$SERVER" 2>/dev/null || { cat "$WORK/server.log"; exit 1; }
  sleep 0.2
done
say "runs as uid $(stat -c %u "/proc/$SERVER"), its root read-only"
answer=$(curl -sf "http://127.0.0.1:$PORT/encode" -H 'content-type: application/json' \
  -d '{"inputs": "To be, or not to be", "dimensions": 4}')
say "answered: $answer"
[[ $answer == *'"embedding":['* ]]
[ -n "$(ls "$WORK/data")" ] || { say "nothing was stored in /data"; exit 1; }
kill -TERM "$SERVER"
wait "$SERVER" || { say "SIGTERM: exit code $?"; exit 1; }
SERVER=
say "SIGTERM: drained and exited 0"
say "passed"
