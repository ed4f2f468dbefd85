"""AdaLoRA (arXiv 2303.10512): LoRA whose rank budget moves to the layers that need it.

Training starts with rank init_r everywhere, then prunes the least important of all triplets
(singular value, left and right vector) until target_r per module are left on average, and ends
with a phase at fixed ranks. PEFT holds the parameters and the importance scores; the schedule, the
penalty, exact resume, the exact budget at the end and the export as plain LoRA are here. It does
not know the training loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from peftrank.errors import ConfigError
from peftrank.methods import _state
from peftrank.methods._state import ADAPTER
from peftrank.methods._targets import check_layers, check_targets, linear_targets, task_type

_IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class Adalora:
    """AdaLoRA. The model starts as the base exactly: the singular values start at zero."""

    learning_rate: ClassVar[float] = 5e-3
    """Default peak learning rate of the adapter's weights: larger than LoRA's, because an update
    is a product of three small factors."""

    def __init__(
        self,
        *,
        total_steps: int,
        init_r: int = 12,
        target_r: int = 8,
        alpha: float = 256,
        dropout: float = 0.0,
        targets: str = "all-linear",
        layers: str = "all",
        orth_weight: float = 0.5,
        warmup_fraction: float = 0.1,
        final_fraction: float = 0.3,
        delta_t: int | None = None,
        beta1: float = 0.85,
        beta2: float = 0.85,
    ):
        """Checks the options and works out the schedule; looks at no model.

        Args:
            total_steps: Optimizer steps of the run.
            init_r: Rank of each update at the start.
            target_r: Mean rank of an update at the end.
            alpha: The update is scaled by alpha / init_r, whatever rank is left: PEFT divides by
                the rank at the start, so this alpha compares with a LoRA of rank init_r.
            dropout: Probability of zeroing an input element of the update while training.
            targets: attention, mlp, all-linear, or regex: and a pattern for the module path.
            layers: all, or top-K for the K blocks nearest the output.
            orth_weight: Weight of the orthogonality penalty, gamma in the paper.
            warmup_fraction: Part of the steps before pruning begins.
            final_fraction: Part of the steps after pruning has ended.
            delta_t: Steps between two prunings; absent: a hundredth of the pruning phase.
            beta1: Smoothing of the importance.
            beta2: Smoothing of its uncertainty.

        Raises:
            ConfigError: an option is out of range, or there are too few steps to prune in.
        """
        if not init_r > target_r >= 1:
            raise ConfigError(
                f"method.init_r={init_r} and method.target_r={target_r}: expected "
                "init_r > target_r >= 1. For a fixed rank use method lora."
            )
        if alpha <= 0:
            raise ConfigError(f"method.alpha={alpha}: expected a number above 0.")
        if not 0.0 <= dropout < 1.0:
            raise ConfigError(f"method.dropout={dropout}: expected at least 0 and below 1.")
        if orth_weight < 0:
            raise ConfigError(f"method.orth_weight={orth_weight}: expected at least 0.")
        for key, value in (("beta1", beta1), ("beta2", beta2)):
            if not 0.0 < value < 1.0:
                raise ConfigError(f"method.{key}={value}: expected above 0 and below 1.")
        if delta_t is not None and delta_t < 1:
            raise ConfigError(f"method.delta_t={delta_t}: expected at least 1.")
        check_targets(targets)
        check_layers(layers)
        self.total_steps = total_steps
        self.init_r, self.target_r, self.alpha, self.dropout = init_r, target_r, alpha, dropout
        self.targets, self.layers = targets, layers
        self.orth_weight, self.beta1, self.beta2 = orth_weight, beta1, beta2
        self.tinit, self.tfinal = _schedule(total_steps, warmup_fraction, final_fraction)
        self.delta_t = delta_t or max(1, (total_steps - self.tinit - self.tfinal) // 100)

    def config(self, base_model: PreTrainedModel) -> PeftConfig:
        """Returns PEFT's configuration for a base.

        Raises:
            ConfigError: `targets` or `layers` match nothing in it.
        """
        return AdaLoraConfig(
            init_r=self.init_r,
            target_r=self.target_r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            tinit=self.tinit,
            tfinal=self.tfinal,
            deltaT=self.delta_t,
            beta1=self.beta1,
            beta2=self.beta2,
            orth_reg_weight=self.orth_weight,
            total_step=self.total_steps,
            target_modules=linear_targets(base_model, self.targets, self.layers),
            task_type=task_type(base_model),
            base_model_name_or_path=base_model.name_or_path or None,
        )

    def penalty(self, model: PeftModel) -> Tensor | None:
        """Returns orth_weight * mean over A and B of ||P P^T - I||_F (eq. 4), or None if it is 0.

        PEFT adds this term only to a loss computed inside its model, so a training loop with a
        loss of its own must add it.
        """
        if self.orth_weight == 0:
            return None
        grams = []
        for layer in _layers(model).values():
            a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]  # (r, inputs), (outputs, r)
            grams += [a @ a.T, b.T @ b]
        stacked = torch.stack(grams)
        identity = torch.eye(stacked.shape[-1], device=stacked.device, dtype=stacked.dtype)
        distances = torch.linalg.matrix_norm(stacked - identity)
        return cast(Tensor, self.orth_weight * distances.mean())

    def after_step(self, model: PeftModel, step: int) -> None:
        """Updates the importance scores and moves the rank budget.

        Args:
            model: Its parameters must still hold the gradients of this step.
            step: 1-based optimizer step.

        Raises:
            ConfigError: a parameter has no gradient.
        """
        if step < self.total_steps - self.tfinal:
            for name, parameter in _trainable(model).items():
                if parameter.grad is None:
                    raise ConfigError(
                        f"AdaLoRA needs a gradient for {name} at every step and there is none. "
                        "Call after_step before zero_grad, and set method.targets to modules that "
                        "the forward pass uses."
                    )
        if step == self.total_steps - self.tfinal:
            # PEFT's own last pruning removes more than the budget where importances tie.
            self._prune_exactly(model)
        else:
            model.base_model.update_and_allocate(step)

    def state_dict(self, model: PeftModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns unpruned parameters, importance scores and ranks, for exact resume.

        PEFT's save_pretrained would cut the pruned triplets off and lose the scores, and a run
        resumed from that prunes below its budget.
        """
        allocator = model.base_model.rankallocator
        tensors = {f"parameter.{name}": t for name, t in _state.read(model).items()}
        for kind in _IMPORTANCE:
            for name, score in getattr(allocator, kind).items():
                tensors[f"{kind}.{name}"] = _state.copied(score)
        pattern = model.peft_config[ADAPTER].rank_pattern
        return tensors, {"rank_pattern": pattern and {k: list(v) for k, v in pattern.items()}}

    def load_state_dict(
        self, model: PeftModel, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> None:
        """Restores what `state_dict` returned. Raises AdapterError if it does not fit."""
        _state.write(model, _under("parameter", tensors))
        devices = {name: p.device for name, p in _state.adapter_parameters(model).items()}
        allocator = model.base_model.rankallocator
        for kind in _IMPORTANCE:
            scores = _under(kind, tensors)
            restored = {name: t.to(devices[name], copy=True) for name, t in scores.items()}
            setattr(allocator, kind, restored)
        pattern = values["rank_pattern"]
        model.peft_config[ADAPTER].rank_pattern = pattern and dict(pattern)

    def finalize(self, model: PeftModel) -> None:
        """Prunes to the budget exactly, whenever training stopped; again changes nothing."""
        if model.base_model.rankallocator.ipt or not model.peft_config[ADAPTER].rank_pattern:
            self._prune_exactly(model)
        else:
            pattern = model.peft_config[ADAPTER].rank_pattern
            model.base_model.rankallocator.mask_using_rank_pattern(model.base_model.model, pattern)

    def ranks(self, model: PeftModel) -> dict[str, int]:
        """Returns the rank each module has now, by its path in the base."""
        pattern = model.peft_config[ADAPTER].rank_pattern or {}
        return {
            path: sum(pattern.get(f"{path}.lora_E.{ADAPTER}", [True] * self.init_r))
            for path in _layers(model)
        }

    def export(self, model: PeftModel) -> tuple[PeftConfig, dict[str, Tensor]]:
        """Returns the same function as a plain LoRA file of PEFT.

        Every module is padded with zeros to the largest rank left, R, and lora_alpha is R, so that
        the scale is 1 and any two such files can be swapped, mixed and merged.
        """
        factors = {path: _factors(layer) for path, layer in _layers(model).items()}
        r = max(1, *(len(a) for a, _ in factors.values()))
        tensors = {}
        for path, (a, b) in factors.items():
            padding = r - len(a)
            name = f"base_model.model.{path}"
            pad = torch.nn.functional.pad
            tensors[f"{name}.lora_A.weight"] = _state.copied(pad(a, (0, 0, 0, padding)))
            tensors[f"{name}.lora_B.weight"] = _state.copied(pad(b, (0, padding)))
        trained = model.peft_config[ADAPTER]
        config = LoraConfig(
            r=r,
            lora_alpha=r,
            target_modules=trained.target_modules,
            task_type=trained.task_type,
            base_model_name_or_path=trained.base_model_name_or_path,
            revision=trained.revision,
            inference_mode=True,
        )
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)  # the same file every time
        return config, tensors

    def _prune_exactly(self, model: PeftModel) -> None:
        """Keeps the target_r * modules most important triplets and ends the pruning phase.

        Ties (all of them, before the first step) go to the first triplets of every module, so no
        module starves.
        """
        allocator = model.base_model.rankallocator
        layers = _layers(model)
        scores = torch.stack([_importance(allocator, path, self.init_r) for path in layers])
        # Rank-major, so that a stable sort breaks ties by triplet first and by module second.
        order = torch.sort(scores.T.flatten(), descending=True, stable=True).indices
        keep = torch.zeros(scores.numel(), dtype=torch.bool)
        keep[order[: self.target_r * len(layers)]] = True
        kept = keep.view(self.init_r, len(layers)).T  # (modules, init_r)
        pattern = {f"{path}.lora_E.{ADAPTER}": kept[i].tolist() for i, path in enumerate(layers)}
        allocator.mask_using_rank_pattern(model.base_model.model, pattern)
        allocator.reset_ipt()
        model.peft_config[ADAPTER].rank_pattern = pattern


def _schedule(total_steps: int, warmup_fraction: float, final_fraction: float) -> tuple[int, int]:
    for key, value in (("warmup_fraction", warmup_fraction), ("final_fraction", final_fraction)):
        if not 0.0 <= value < 1.0:
            raise ConfigError(f"method.{key}={value}: expected at least 0 and below 1.")
    tinit = max(1, round(warmup_fraction * total_steps))
    tfinal = round(final_fraction * total_steps)
    if total_steps - tinit - tfinal < 2:
        raise ConfigError(
            f"AdaLoRA has no steps to prune in: {total_steps} optimizer steps, of which "
            f"method.warmup_fraction={warmup_fraction} takes {tinit} and "
            f"method.final_fraction={final_fraction} takes {tfinal}; at least 2 must be left. "
            "Train longer (training.max_steps or training.epochs), lower the fractions, or use "
            "method lora."
        )
    return tinit, tfinal


def _layers(model: PeftModel) -> dict[str, AdaLoraLayer]:
    modules = model.base_model.model.named_modules()
    return {path: module for path, module in modules if isinstance(module, AdaLoraLayer)}


def _trainable(model: PeftModel) -> dict[str, Tensor]:
    parameters = _state.adapter_parameters(model)
    return {name: parameter for name, parameter in parameters.items() if "lora_" in name}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = prefix + "."
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def _importance(allocator: Any, path: str, init_r: int) -> Tensor:  # noqa: ANN401 - PEFT's
    """Returns the importance of a module's triplets, (init_r,) float32 on the CPU: eq. 6 and 7.

    Smoothed sensitivity times uncertainty of every element, averaged over each vector. Zeros
    before the first step.
    """
    a, b, e = (f"{path}.lora_{part}.{ADAPTER}" for part in "ABE")
    if e not in allocator.ipt:
        return torch.zeros(init_r)
    # The operations of PEFT's mask_to_budget, in its order, so that the choice is the same.
    of_a = torch.mean(allocator._element_score(a), dim=1)
    of_b = torch.mean(allocator._element_score(b), dim=0)
    of_e = allocator._element_score(e).view(-1)
    return cast(Tensor, of_e + torch.stack([of_a, of_b], dim=1).sum(dim=1)).float().cpu()


def _factors(layer: AdaLoraLayer) -> tuple[Tensor, Tensor]:
    """Returns A' (kept, inputs) and B' (outputs, kept) with B' A' equal to the layer's update."""
    a, b, e = (part[ADAPTER].detach() for part in (layer.lora_A, layer.lora_B, layer.lora_E))
    kept = e.view(-1) != 0  # pruned singular values are exactly zero
    scale = layer.scaling[ADAPTER] / (layer.ranknum[ADAPTER].item() + 1e-5)
    return (a * e)[kept], b[:, kept] * scale
