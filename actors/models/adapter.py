"""Refuse an adapter that does not fit. Loads no torch, so that the engines' interface stays light."""

from actors.types import Adapter, AdapterLayout
from conf.errors import UsageError

WEIGHTS = "adapter_model.safetensors"  # in the folder of an adapter, and of a checkpoint


class AdapterError(UsageError):
    """An adapter that does not fit the model, or holds NaN or infinity."""


def check_adapter(adapter: Adapter, layout: AdapterLayout | None = None) -> None:
    """Raises AdapterError if the buffer has the wrong size or a layout other than `layout`, or is not finite."""
    if layout is not None and adapter.layout != layout:
        raise AdapterError("the adapter was made for other modules, another rank or another alpha")
    if tuple(adapter.flat.shape) != (adapter.layout.size,):
        raise AdapterError(
            f"adapter buffer has shape {tuple(adapter.flat.shape)}, its layout says ({adapter.layout.size},)"
        )
    if not bool(adapter.flat.isfinite().all()):
        raise AdapterError(f"adapter version {adapter.version} holds NaN or infinity; lower learner.learning_rate")
