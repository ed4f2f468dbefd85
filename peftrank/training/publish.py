"""A finished run becomes a version in the store, and proves that it scores as it did in training.

The check reads the new files back, puts them on the bare base and compares scores; only then is
the version activated. So an adapter or a readout that was not really saved is never published.
"""

from __future__ import annotations

from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list

from peftrank import __version__
from peftrank.card import adapter_card
from peftrank.errors import AdapterError
from peftrank.peft_files import adapter_ranks
from peftrank.ranker import Ranker
from peftrank.store import AdapterFiles, activate, save_adapter
from peftrank.training.data import fingerprint
from peftrank.training.run import Run, passes
from peftrank.types import Slate

_CHECKED_SLATES = 8
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


def publish(run: Run, output: Path, metrics: dict[str, float]) -> Path:
    """Saves, checks and activates the run's adapter; returns its folder. Unloads it from the base.

    Of several processes the main one does it; a sharded base computes in all of them, so then all
    read the saved files.

    Raises:
        AdapterError: the disk refuses, or the saved adapter does not give the scores it gave.
    """
    main = run.accelerator.is_main_process
    checked = run.valid[:_CHECKED_SLATES]
    expected = _scores(run, checked)
    path = cast(Path, broadcast_object_list([_save(run, output, metrics) if main else None])[0])
    run.adapted.unload()
    if main or run.sharded:
        _check(run, path, checked, expected)
    if main:
        activate(output, run.config.domain, path.name)
    run.accelerator.wait_for_everyone()
    return path


def _save(run: Run, output: Path, metrics: dict[str, float]) -> Path:
    config, tensors = run.method.export(run.adapted)
    # PEFT notes where the weights lay on this machine; others need the model's public name.
    config.base_model_name_or_path = run.base.identity.model_id
    manifest = _manifest(run, metrics)
    files = AdapterFiles(
        peft_config=config.to_dict(),
        tensors={name: tensor.detach().cpu() for name, tensor in tensors.items()},
        readout={name: t.detach().cpu() for name, t in run.readout.state_dict().items()},
        manifest=manifest,
    )
    ranks = adapter_ranks(files.peft_config, files.tensors)
    card = adapter_card(manifest, peft_config=files.peft_config, ranks=ranks)
    return save_adapter(output, run.config.domain, files, card=card, activate=False)


def _scores(run: Run, slates: list[Slate]) -> list[torch.Tensor]:
    """Returns each slate's scores, scored alone.

    Rounding depends on what else is in a pass; in int8 (LLM.int8) so much that it hides an error.
    """
    run.model.eval()
    found = []
    with torch.no_grad():
        for slate in slates:
            ((_, batch),) = passes(run, [slate])
            found.append(run.model(batch).float().cpu()[0, : len(slate.candidates)])
    return found


def _check(run: Run, path: Path, slates: list[Slate], expected: list[torch.Tensor]) -> None:
    with Ranker(run.base) as ranker:
        domain = ranker.load_adapter(path, allow_code=True)
        found = [ranker.score(slate, domain=domain) for slate in slates]
    before = torch.cat(expected)
    after = torch.cat([torch.tensor(scores) for scores in found])
    # Rounding differs where AdaLoRA's three factors became LoRA's two.
    relative = 1e-3 if run.base.compute_dtype == torch.float32 else 5e-2
    worst = float((before - after).abs().max())
    limit = relative * max(1.0, float(before.abs().max()))
    if not worst <= limit:
        raise AdapterError(
            f"the adapter saved in {path} does not score as it did in training: scores differ by "
            f"up to {worst:.3g} (limit {limit:.3g}). It was not activated. Please report this."
        )


def _manifest(run: Run, metrics: dict[str, float]) -> dict[str, Any]:
    config = run.config.model_dump(mode="json")
    # Where the data lay on this machine is nobody's business; what it was is the fingerprint.
    for part, path in config["data"].items():
        config["data"][part] = Path(path).name if isinstance(path, str) else path
    return {
        "peftrank_version": __version__,
        "method": {"name": run.config.method.name, "options": run.config.method.options},
        "domain": run.config.domain,
        "prompt": run.template.describe(),
        "readout": {
            "name": run.config.readout.name,
            "options": run.config.readout.options,
            "feature_names": list(run.features),
        },
        "base": asdict(run.base.identity),
        "config": config,
        "metrics": {**metrics, "best_step": run.best_step, "steps": run.step},
        "data": {
            "fingerprint": fingerprint(run.train),
            "counts": {"train": len(run.train), "valid": len(run.valid)},
        },
        "versions": {name: metadata.version(name) for name in _LIBRARIES},
    }
