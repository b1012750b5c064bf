#!/usr/bin/env bash
# How many expert questions is what a cycle accepts worth? SFT on k expert questions, and the cycles' own
# points at the number of questions that they were trained on (the paper's Figure 2).
#
#   python benchmarks/seeds.py                           first: its runs have plenty of expert questions
#   bash benchmarks/efficiency.sh                        into runs/efficiency; the same command resumes
#
# Each point of the curve has as many steps as the SFT of one cycle. Ends with OUT/curve: metrics.json,
# efficiency.svg, efficiency.png.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/efficiency}
RUNS=${RUNS:-runs/seed}                  # finished runs of cycle.sh with CONTROLS=1, without the seed
SEEDS=${SEEDS:-0 1 2}
SIZES=${SIZES:-600 1200 3000}            # k beside the run's own expert questions
SFT_FLAGS=${SFT_FLAGS:---steps 1000}
. ./setup.sh requirements.txt

curve="SFT on expert questions" runs=()
for s in $SEEDS; do
  d=$OUT/seed$s run=$RUNS$s
  common="--seed $s --image-root $run"
  mkdir -p "$d"
  runs+=("$curve:$(wc -l < "$run/data/expert.jsonl")=$run/eval_sft_expert")
  for k in $SIZES; do
    [ -e "$d/k$k.jsonl" ] ||
      "$PYTHON" benchmarks/subset.py "$run/data/plenty.jsonl" --k "$k" --seed "$s" --out "$d/k$k.jsonl"
    [ -e "$d/k$k" ] ||
      "$PYTHON" sft.py --model toy/policy --data "$d/k$k.jsonl" --out "$d/k$k" $common $SFT_FLAGS
    [ -e "$d/eval_k$k" ] ||
      "$PYTHON" eval.py --model "$d/k$k" --data "$run/data/test.jsonl" --out "$d/eval_k$k" $common
    runs+=("$curve:$k=$d/eval_k$k")
  done
done
# The cycles' points, at the mean of the seeds.
for c in 1 2 3; do
  count=0 n=0
  for s in $SEEDS; do
    files=("$RUNS$s/data/expert.jsonl")
    for before in $(seq "$c"); do files+=("$RUNS$s/cycle$before/scored/accepted.jsonl"); done
    count=$((count + $(cat "${files[@]}" | wc -l))) n=$((n + 1))
  done
  for s in $SEEDS; do runs+=("cycle $c: SFT on accepted:$((count / n))=$RUNS$s/cycle$c/eval_sft"); done
done
[ -e "$OUT/curve" ] ||
  "$PYTHON" -m analysis.efficiency "${runs[@]}" --worth "$curve" --out "$OUT/curve"
echo "all in $OUT"
