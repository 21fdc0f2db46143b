# SPDX-License-Identifier: Apache-2.0
"""Which devices an evaluation takes: found out and checked before anything is loaded, and said."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from vtprune.errors import ConfigError
from vtprune.eval.axes import values_of
from vtprune.eval.config import EvalConfig
from vtprune.eval.inputs import check_device
from vtprune.eval.running.processes import launched


def with_devices(config: EvalConfig) -> EvalConfig:
    """The configuration with the devices that it takes on this machine instead of `auto`.

    Raises ConfigError if a device is not there, or if `auto` is a device that the configuration names, too.
    """
    found = [_accelerator() if device == "auto" else device for device in values_of(config.device)]
    if launched() == 1:  # several processes get a GPU each, which `Processes.start` checks
        for device in found:
            check_device(device)
    if len(set(found)) < len(found):
        raise ConfigError(f"device: 'auto' is {_accelerator()!r} on this machine, and the list has that, too")
    return config.model_copy(update={"device": tuple(found) if len(found) > 1 else found[0]})


def _accelerator() -> str:
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def taken(config: EvalConfig) -> str:
    """What an evaluation takes, in words; `config` is from `with_devices`."""
    spread = " with device_map auto" if config.device_map else ""
    return (
        f"device {_listed(config.device, _with_name)}{spread}, dtype {_listed(config.dtype)}, "
        f"attention {_listed(config.attention)}"
    )


def _listed(setting: Any, say: Any = str) -> str:
    return " and ".join(map(say, values_of(setting)))


def _with_name(device: str) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device


def place_of(model: Any) -> str:
    """The device of a loaded model, in words; of one that `device_map: auto` spread, all its devices."""
    places = list(getattr(model, "hf_device_map", {}).values())
    if len(set(places)) < 2:
        return str(model.device)
    kind = _accelerator()
    counts = Counter(f"{kind}:{place}" if isinstance(place, int) else str(place) for place in places)
    return ", ".join(f"{device} ({count} parts)" for device, count in counts.items())
