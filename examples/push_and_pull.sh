#!/usr/bin/env bash
# Share an adapter on the Hugging Face Hub, and use it as a stranger would.
#   bash examples/push_and_pull.sh                             what would be uploaded
#   hf auth login; REPO=you/news-ranker bash examples/push_and_pull.sh
set -euo pipefail
mine=.demo/share/adapters theirs=.demo/share/pulled
base=(--base "${BASE:-minilm-l6}" --set base.quantization=none)

peftrank train --domain news --method lora --output "$mine" "${base[@]}" \
    --set method.layers=all --set training.max_steps=5 --set training.eval_slates=50

# A licence is needed; those of the base and of the training data must allow it.
push=(peftrank adapters push news "${REPO:-you/news-ranker}" --store "$mine" --license apache-2.0)
"${push[@]}" --dry-run
if [ -z "${REPO:-}" ]; then
    echo "Nothing was uploaded. Set REPO to a repository of yours to go on."
    exit
fi
"${push[@]}"

peftrank adapters pull "$REPO" --store "$theirs"
peftrank adapters verify news --store "$theirs"
peftrank rank --domain news --store "$theirs" "${base[@]}" --index 0
