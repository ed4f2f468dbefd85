"""Training steps beside peers: the same base, LoRA, slates, precision and process.

    python -m benchmarks.training                                    # smollm2-135m, bfloat16
    python -m benchmarks.training --base minilm-l6 --dtype float32   # sentence-transformers

A step is every slate's loss and gradients and one step of AdamW. Times are ratios of cases that run
in turns. Peak memory is that of a process of its own with all slates in one forward pass, above
what the process held before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.peers import compare, cross_encoder, letters, ours, pointwise
from benchmarks.peers.setting import Case, Setting

OWN = "PeftRank, isolated"
POINTWISE = "pointwise prompts (TALLRec)"
LETTERS = "letters, last token's logits"
LETTERS_ALL = "letters, all logits (LlamaRec)"


def cases(given: Setting) -> Mapping[str, Case]:
    """Returns what is compared on a base."""
    own = {
        OWN: ours.training(given),
        f"{OWN}, a row per slate": ours.training(given, packing=False),
        "PeftRank, joint": ours.training(given, mode="joint"),
        "PeftRank, set": ours.training(given, mode="set"),
    }
    if given.base.is_decoder:
        return own | {
            f"{OWN}, all logits": ours.training(given, logits=True),
            POINTWISE: pointwise.training(given),
            LETTERS: letters.training(given),
            LETTERS_ALL: letters.training(given, logits="all"),
        }
    if cross_encoder.left_out():
        return own
    return own | {cross_encoder.NAME: cross_encoder.CrossEncoderPeer(given).training()}


COMPARISON = compare.Comparison(
    name="training",
    cases=cases,
    own=OWN,
    goals={POINTWISE: 8, cross_encoder.NAME: 6, LETTERS: 1.3, LETTERS_ALL: 1.3},
    memory_goals={POINTWISE: 5},
    slates=4,
    rounds=3,
)


def main(arguments: Sequence[str] | None = None) -> None:
    compare.run(COMPARISON, arguments)


if __name__ == "__main__":
    main()
