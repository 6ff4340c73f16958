#!/bin/sh
# From the model in production to an image that serves it: bentoml build, bentoml containerize, with docker or podman.
# With WANDB=1 the image holds wandb too, and may pull its models from W&B (MODELS_FROM=wandb).
set -eu
root=$PWD
case $BIN in /*) ;; *) BIN=$root/$BIN ;; esac
engine=${ENGINE:-$(docker info >/dev/null 2>&1 && echo docker || echo podman)}
[ -n "${WANDB:-}" ] && packages=follow kind=-wandb || packages=serve kind=
command -v "$engine" >/dev/null || { echo "docker or podman is needed; on Debian: apt-get install podman"; exit 1; }

bento=$("$BIN/bentoml" build --output tag | sed -n 's/^__tag__://p')
models=$("$BIN/bentoml" get "$bento" -o json |
  "$BIN/python" -c 'import json, sys; print(*(m["tag"] for s in json.load(sys.stdin)["services"] for m in s["models"]))')
[ -n "$models" ] || { echo "there is no model to pack: train, import and promote one (make serve does)"; exit 1; }
echo "packing $models into $bento"

# bentoml reads the Dockerfile's template from its folder of temporary files, and only below the current folder
cd "$(dirname "$(mktemp -u)")"
[ "$engine" = podman ] && format="--opt format=docker" || format= # podman's own format has no health checks
# shellcheck disable=SC2086
"$BIN/python" -W ignore "$BIN/bentoml" containerize "$bento" --backend "$engine" --image-tag "$bento$kind" --image-tag "fraud_bento:production$kind" --opt build-arg=PACKAGES=$packages $format
"$engine" image inspect --format '{{.Size}}' "$bento$kind" | awk '{printf "%.0f MB\n", $1 / 1e6}'
echo "run it: $engine run --read-only --volume fraud-state:/state -p 3000:3000 $bento$kind"
