# Sourced by ablations.sh and large.sh: a cycle on a smaller clinic with fewer steps. With SMALLEST, the
# smallest.
export PYTHON CYCLES=3 CLINIC_FLAGS="--sizes 100 200 300 200 400" SFT_FLAGS="--steps 500"
export GENERATE_FLAGS="--per-image 2" GRPO_FLAGS="--steps 50" REWARD_FLAGS="" SCORE_FLAGS="--threshold 8"
if [ -n "$SMALLEST" ]; then
  CYCLES=2 CLINIC_FLAGS="--sizes 12 6 8 8 8" SFT_FLAGS="--steps 2" REWARD_FLAGS="--resamples 1 --steps 50"
  GRPO_FLAGS="--steps 1 --prompts 2 --group 4 --watch-items 8 --min-spread -1" SCORE_FLAGS="--keep 0.5"
fi
