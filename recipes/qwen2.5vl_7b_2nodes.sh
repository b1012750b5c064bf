#!/usr/bin/env bash
# Qwen2.5-VL-7B on OmniMedVQA, three cycles, whole weights learn: two nodes of eight GPUs of 48 GB.
#
#   salloc --nodes 2 bash recipes/qwen2.5vl_7b_2nodes.sh     in a Slurm allocation, with OUT on a shared disk
#
# cycle.sh runs on the first node; `srun` starts every stage on both. Without Slurm, let START be what starts a
# command on each node. Estimated, not measured: as qwen2.5vl_7b_8x48gb.sh (each node holds the whole model, in
# eight parts: 29.2 GB in SFT, 36.7 GB in GRPO), about half of its 9 hours a cycle.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-Qwen/Qwen2.5-VL-7B-Instruct}
START=${START:-srun --nodes 2 --ntasks-per-node 1}
export OUT=${OUT:-runs/omni_7b_2nodes} GPU_GB=48 DISK_GB=${DISK_GB:-600}
export PLANS="sft-7b-shard-8-checkpointing grpo-7b-shard-8-checkpointing"
rendezvous="--rdzv_backend c10d --rdzv_endpoint ${HEAD:-$(hostname)}:29500"
export LAUNCH=${LAUNCH:-$START torchrun --nnodes 2 $rendezvous --nproc_per_node ${GPUS:-8}}
SFT_FLAGS="--shard --gradient-checkpointing --lr 1e-5 --batch 64 --micro-batch 4"
GRPO_FLAGS="--shard --lr 1e-6 --prompts 32 --micro-batch 1 --micro-group 2 --gradient-checkpointing"
. recipes/omnimedvqa.sh
