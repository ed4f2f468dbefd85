"""Training: the one loop, its checkpoints, and what it reads."""

from peftrank.training.loop import Interrupted, train

__all__ = ["Interrupted", "train"]
