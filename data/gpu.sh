#!/usr/bin/env bash
# A quarter of an hour of one GPU: text, a drafter of the shipped shape, the trio of the comparison, then the measurements.
# usage: data/gpu.sh [text] [drafter] [trio] [bench]; no word: all four, in this order. What is cut short resumes when called again.
# REHEARSE=1: toy sizes on the CPU. STEPS, SHARDS, MINUTES: see below. KEEP: a folder for copies of what is worth taking home.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} work=${WORK:-runs/gpu} seed=${SEED:-11}
if [ -z "${REHEARSE:-}" ]; then
  shards=${SHARDS:-7} batch=4096 tokens=448 steps=${STEPS:-4000} sequences=16 anchors=64 device="--device cuda" toy=""  # 1.3 M answer tokens a shard
else
  shards=${SHARDS:-2} batch=40 tokens=144 steps=${STEPS:-3} sequences=2 anchors=4 device="--device cpu" toy=--rehearse
fi
common="$device ${TARGET:+--target $TARGET} --corpus $work/text.json"  # 7 shards of 4 MB and a manifest
shape="--steps $steps --sequences $sequences --anchors $anchors --lr 2e-3"

text() { $python -m dspark.train corpus $common --rows $((shards * batch)) --batch $batch --tokens $tokens --seed "$seed"; }
drafter() { $python -m dspark.train drafter $common $shape --weight-decay 0.1 --learn-from all --out "$work/drafter"; }
trio() { $python -m dspark.train compare $common $shape --only main --stages train --out "$work/trio" ${toy:+--features $work/features}; }
bench() { $python -m dspark.bench gpu $toy --minutes "${MINUTES:-5}" --out "$work/bench"; }

stages=${*:-text drafter trio bench}
for stage in $stages; do
  case $stage in text | drafter | trio | bench) ;; *) echo "data/gpu.sh: stage $stage is unknown: text, drafter, trio, bench" >&2; exit 2 ;; esac
done
for stage in $stages; do
  echo "== $stage, $(date +%T)"
  status=0
  $stage || status=$?
  if [ -n "${KEEP:-}" ]; then  # no checkpoints: they are large
    mkdir -p "$KEEP"
    tar -C "$work" --exclude="*.training" --exclude=./features -cf - . | tar -C "$KEEP" -xf -
  fi
  [ $status = 0 ] || exit $status
done
