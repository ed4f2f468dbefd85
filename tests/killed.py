"""A training in a process that may be killed at any moment. Imported by that process too."""

import contextlib
import os
from pathlib import Path


def run(config: str, output: str, resume: str | None, log: str) -> None:
    """Trains in this process, on one thread, so that results are equal to the bit."""
    import torch

    from peftrank.config import Config
    from peftrank.training import train

    with Path(log).open("w") as file, contextlib.redirect_stderr(file):
        os.dup2(file.fileno(), 2)
        torch.set_num_threads(1)
        settings = Config.model_validate_json(config)
        train(settings, output=Path(output), resume=None if resume is None else Path(resume))
