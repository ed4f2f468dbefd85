"""The adapter's tensors inside a PeftModel: read for a checkpoint, written back, exported.

It knows PEFT's state functions and nothing about any one method.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, no_grad

from peftrank.errors import AdapterError

ADAPTER = "default"
"""Every adapter has this name inside its PeftModel."""


def adapter_parameters(model: PeftModel) -> dict[str, Tensor]:
    """Returns the adapter's live parameters by their name in the wrapped base model."""
    return {
        name: parameter
        for name, parameter in model.base_model.model.named_parameters()
        if f".{ADAPTER}." in name or name.endswith(f".{ADAPTER}")
    }


def read(model: PeftModel) -> dict[str, Tensor]:
    """Returns copies of the adapter's parameters, on the CPU, for a checkpoint."""
    return {name: copied(parameter) for name, parameter in adapter_parameters(model).items()}


def write(model: PeftModel, tensors: Mapping[str, Tensor]) -> None:
    """Copies what `read` returned back into the adapter's parameters, in place.

    Raises:
        AdapterError: names or shapes differ from the model's; nothing is written then.
    """
    parameters = adapter_parameters(model)
    if parameters.keys() != tensors.keys():
        differing = sorted(parameters.keys() ^ tensors.keys())
        raise AdapterError(
            f"the checkpoint's {len(tensors)} adapter tensors are not the model's "
            f"{len(parameters)}; differing: {', '.join(differing[:3])}. Resume with the method, "
            "targets and layers the checkpoint was written with."
        )
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise AdapterError(
                f"the checkpoint's {name} has shape {tuple(tensors[name].shape)}, the model's "
                f"{tuple(parameter.shape)}. Resume with the rank the checkpoint was written with."
            )
    with no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def exported(model: PeftModel) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Returns copies of PEFT's configuration and file tensors, ready to be written."""
    config = copy.deepcopy(model.peft_config[ADAPTER])
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # the same file every time
    tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    return config, {name: copied(tensor) for name, tensor in tensors.items()}


def copied(tensor: Tensor) -> Tensor:
    """Returns a contiguous copy on the CPU, without graph."""
    return tensor.detach().cpu().contiguous().clone()
