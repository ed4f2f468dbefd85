#!/usr/bin/env bash
# The main job on the embedded news sample: train, compare, rank. Run it with `make demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
store=.demo/adapters
rm -rf "$store"

stage() {
    printf '\n== %s (%s s so far)\n' "$1" "$SECONDS"
}

stage "Train an AdaLoRA adapter for news on NF4 SmolLM2-135M"
peftrank train --method adalora --domain news --output "$store"
stage "Compare it with the untrained base and the baselines on the test part"
peftrank evaluate --domain news --store "$store"
stage "Rank one list"
peftrank rank --domain news --store "$store" --index 0
stage "Done"
