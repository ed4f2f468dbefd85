#!/usr/bin/env bash
# Your own data: a folder with clicks.csv (user,item,time) and items.csv (item,title) becomes
# slates, an adapter and a comparison. Give your folder as the argument.
set -euo pipefail
data=${1:-$(dirname "$0")/data} work=.demo/csv
quick=(--base "${BASE:-minilm-l6}" --set base.quantization=none --set method.layers=all)

# Each user's last click is for the test, the one before it for validation.
peftrank data prepare --format csv --path "$data" --output "$work/slates" \
    --n-negatives 9 --targets-per-user 3 --features popularity,text_overlap
peftrank data inspect "$work/slates"

peftrank train --domain ecommerce --data "$work/slates" --output "$work/adapters" \
    "${quick[@]}" --set training.max_steps=10
peftrank evaluate --domain ecommerce --data "$work/slates" --store "$work/adapters" \
    --baselines random,popularity
