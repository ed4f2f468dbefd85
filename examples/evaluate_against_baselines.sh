#!/usr/bin/env bash
# Accuracy with its floors beside it: chance, popularity, BM25, the untrained base, and cold items.
# The page it writes, .demo/evaluate/report.html, has the same tables with every interval.
set -euo pipefail
store=.demo/evaluate/adapters
quick=(--base "${BASE:-minilm-l6}" --set base.quantization=none --set method.layers=all)

peftrank train --domain news --method lora --output "$store" "${quick[@]}" \
    --set training.max_steps=30

peftrank evaluate --domain news --store "$store" --limit 100 \
    --metrics ndcg@10,mrr,hit@1 --baselines random,popularity,bm25,zero_shot \
    --report .demo/evaluate/report.html --json .demo/evaluate/report.json
