#!/usr/bin/env bash
# Qwen2.5-VL-3B on OmniMedVQA, three cycles on one node of eight GPUs with 80 GB each.
#
# THIS HAS NOT BEEN RUN AT THIS SIZE. docs/scale.md says what was tried and how much memory
# each stage needs.
#
#   OMNIMEDVQA=path/to/OmniMedVQA bash recipes/qwen2_5_vl_3b_omnimedvqa_8gpu.sh
#
# The same command resumes it.
set -euo pipefail
cd "$(dirname "$0")/.."
. ./setup.sh requirements.txt

OMNIMEDVQA=${OMNIMEDVQA:-OmniMedVQA}            # the data set, with its folder QA_information
DATA=${DATA:-data}                              # record files to write
MODEL=${MODEL:-Qwen/Qwen2.5-VL-3B-Instruct}     # policy, generator and reward backbone
GPUS=${GPUS:-8}
export OUT=${OUT:-runs/omni} CYCLES=${CYCLES:-3} SEED=${SEED:-0}
export POLICY=$MODEL GENERATOR=$MODEL REWARD_BACKBONE=$MODEL
export LAUNCH="accelerate launch --num_processes $GPUS"
export GENERATE_FLAGS="--max-new-tokens 512 --batch 4"
export REWARD_FLAGS="--batch 4"
export SCORE_FLAGS="--keep 0.5 --batch 4"
export SFT_FLAGS="--lr 1e-5 --epochs 2 --batch 32 --micro-batch 4 --gradient-checkpointing"
export GENERATOR_FLAGS="--lr 1e-5 --epochs 1 --batch 32 --micro-batch 4 --gradient-checkpointing"
# The default, no KL term, loads no reference: it would not fit into 80 GB.
export GRPO_FLAGS="--lr 1e-6 --steps 500 --prompts 16 --max-new-tokens 512 --micro-batch 1 --watch-every 50"
export MORE_FLAGS="--lr 3e-6"
export EVAL_FLAGS="--max-new-tokens 512 --batch 16"

records() { "$PYTHON" -m medgr2.records "$@"; }
[ -e "$DATA/omni.jsonl" ] ||
  records import "$OMNIMEDVQA/QA_information" --images "$OMNIMEDVQA" --out "$DATA/omni.jsonl"
# 5% of the images for the experts, 75% as the unlabelled pool, 20% to test on.
[ -e "$DATA/test.jsonl" ] ||
  records split "$DATA/omni.jsonl" --image-root "$OMNIMEDVQA" --out "$DATA" \
    --train 0.05 --val 0.75 --test 0.2 --seed 0
# A hundredth of the pool is for the watch.
[ -e "$DATA/rest/val.jsonl" ] ||
  records split "$DATA/val.jsonl" --image-root "$OMNIMEDVQA" --out "$DATA/rest" \
    --train 0.99 --val 0.01 --test 0 --seed 0

export EXPERT=$DATA/train.jsonl IMAGES=$DATA/rest/train.jsonl IMAGE_ROOT=$OMNIMEDVQA
export VAL=$DATA/rest/val.jsonl TEST=$DATA/test.jsonl
exec bash cycle.sh
