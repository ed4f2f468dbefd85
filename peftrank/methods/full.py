"""Classic fine-tuning of every block: what parameter efficiency is compared with.

All weights of all blocks and the final norm train, as in `top_layers`. The embeddings do not: they
are tied to the vocabulary head that token readouts share, and a fifth to a half of the bases that
have an alias.
"""

from __future__ import annotations

from peft import PeftConfig
from transformers import PreTrainedModel

from peftrank.methods import _whole
from peftrank.methods.top_layers import TopLayers


class Full(TopLayers):
    """Fine-tuning of all blocks. The model starts as the base exactly."""

    def __init__(self, *, total_steps: int):
        """Takes no options.

        Args:
            total_steps: Optimizer steps of the run; fine-tuning does not need them.
        """
        # No `layers`: --method full would keep that of a domain's file, and not be full.
        super().__init__(total_steps=total_steps, layers="all")

    def config(self, base_model: PreTrainedModel) -> PeftConfig:
        """Returns PEFT's configuration for a base; raises as `_whole.config`."""
        return _whole.config(base_model, "all", method="full")
