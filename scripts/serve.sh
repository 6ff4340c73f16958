#!/bin/sh
# Serve the model in production. Where there is none yet: simulate transactions, train on them, promote the result.
set -eu
if ! "$BIN/fraud" models --production >/dev/null 2>&1; then
  model=fraud-transaction
  echo "no model in production yet: simulating transactions and training a first one"
  "$BIN/fraud" simulate --customers 400 --days 90 --seed 1 --out "$WORK/data/simulated.parquet"
  "$BIN/fraud" train --data "$WORK/data/simulated.parquet" --mapping examples/simulated.yaml --config examples/quick.yaml --runs "$WORK/runs"
  "$BIN/fraud" import "$(ls -d "$WORK"/runs/$model-* | tail -n 1)"
  "$BIN/fraud" promote $model:candidate --why "the first model"
fi
"$BIN/bentoml" serve --port "$PORT" &
server=$!
trap 'kill -TERM $server; wait $server' INT TERM
"$BIN/fraud" try --url "http://localhost:$PORT" --wait 60 || { kill -TERM $server; exit 1; }
echo "ready; the API is at http://localhost:$PORT, Ctrl-C ends it"
wait $server
