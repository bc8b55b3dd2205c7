"""What several backends ask of a layer before they take it."""

from __future__ import annotations

from collections.abc import Collection

from festina.spec import LayerSpec


class BackendError(RuntimeError):
    """A choice was forced, of a backend or of a part of one, that is unknown or cannot be had for the call."""


def missing_kernel(layer: LayerSpec, steps: Collection[str]) -> str | None:
    """Why a backend without kernels for the rarest plans refuses a layer, as `can_run` says it; None if it need not.

    Args:
        steps: the names of the step functions that the backend has kernels for.
    """
    phrases = {
        "a plan where the reset gate acts before the norm": layer.plan.reset != "normed",
        "a plan where c is clipped": layer.plan.clip is not None,
        "a plan where a bias sits inside the recurrent norm": "bias_inner_hh" in layer.parameter_names,
        f"the {layer.step} step": layer.step not in steps,
    }
    return next((f"it has no kernel for {what}" for what, is_needed in phrases.items() if is_needed), None)
