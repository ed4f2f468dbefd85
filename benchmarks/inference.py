"""Scoring slates beside peers: the same base, LoRA, slates, precision and process.

    python -m benchmarks.inference                                   # smollm2-135m, bfloat16
    python -m benchmarks.inference --base minilm-l6 --dtype float32  # sentence-transformers

Times are ratios of cases that run in turns, from tokens to scores (or to the tokens written).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.peers import compare, cross_encoder, generated, letters, ours, pointwise
from benchmarks.peers import pointwise_kv as kv
from benchmarks.peers.setting import Case, Setting

OWN = "PeftRank, isolated"
POINTWISE = "pointwise prompts (TALLRec)"
KV = "pointwise, user's keys and values once"
KV_ALONE = f"{KV}, slate by slate"
GENERATED = "generated ranking (RankGPT)"


def cases(given: Setting) -> Mapping[str, Case]:
    """Returns what is compared on a base."""
    own = {
        OWN: ours.scoring(given),
        f"{OWN}, a row per slate": ours.scoring(given, packing=False),
        "PeftRank, joint": ours.scoring(given, mode="joint"),
        "PeftRank, set": ours.scoring(given, mode="set"),
    }
    if given.base.is_decoder:
        return own | {
            f"{OWN}, histories kept": ours.again(given),
            f"{OWN}, all logits": ours.scoring(given, logits=True),
            POINTWISE: pointwise.scoring(given),
            KV: kv.scoring(given),
            KV_ALONE: kv.scoring(given, together=False),
            "letters, last token's logits": letters.scoring(given),
            "letters, all logits (LlamaRec)": letters.scoring(given, logits="all"),
            GENERATED: generated.scoring(given),
        }
    if cross_encoder.left_out():
        return own
    return own | {cross_encoder.NAME: cross_encoder.CrossEncoderPeer(given).scoring()}


COMPARISON = compare.Comparison(
    name="inference",
    cases=cases,
    own=OWN,
    goals={POINTWISE: 8, KV: 1.3, KV_ALONE: 1.3, GENERATED: 5},
    slates=4,
    rounds=5,
)


def main(arguments: Sequence[str] | None = None) -> None:
    compare.run(COMPARISON, arguments)


if __name__ == "__main__":
    main()
