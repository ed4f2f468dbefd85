"""Training: the one loop, its checkpoints, and what it reads.

`train` is resolved when first used: whoever only reads slates need not wait for PEFT.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftrank.training.loop import Interrupted, train

__all__ = ["Interrupted", "train"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in __all__:
        raise AttributeError(f"module 'peftrank.training' has no attribute {name!r}")
    from peftrank.training import loop

    return getattr(loop, name)
