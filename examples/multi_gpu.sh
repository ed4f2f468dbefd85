#!/usr/bin/env bash
# Train on all GPUs of a machine. A step takes the same batch (training.batch_size slates) whatever
# their number, so the adapter is that of one GPU up to rounding. Without a GPU: two CPU processes.
# Several machines: the same command on each, with torchrun's --nnodes, --node-rank, --master-addr.
set -euo pipefail
processes=$(python -c "import torch; print(torch.cuda.device_count())")
if [ "$processes" = 0 ]; then processes=2; fi
echo "$processes processes"

torchrun --standalone --nproc-per-node "$processes" -m peftrank train \
    --domain news --method lora --output .demo/multi-gpu/adapters \
    --base "${BASE:-minilm-l6}" --set base.quantization=none --set method.layers=all \
    --set training.max_steps=10
