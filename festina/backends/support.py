"""What several backends ask of a layer before they take it."""

from __future__ import annotations

from collections.abc import Callable, Collection

from festina.spec import LayerSpec


class BackendError(RuntimeError):
    """A choice was forced, of a backend or of a part of one, that is unknown or cannot be had for the call."""


RARE: dict[str, tuple[str, Callable[[LayerSpec], bool]]] = {
    "product": ("a plan where the reset gate acts before the norm", lambda layer: layer.plan.reset == "product"),
    "state": ("a plan where the reset gate acts before the product", lambda layer: layer.plan.reset == "state"),
    "clip": ("a plan where c is clipped", lambda layer: layer.plan.clip is not None),
    "inner_bias_hh": (
        "a plan where a bias sits inside the recurrent norm",
        lambda layer: "bias_inner_hh" in layer.parameter_names,
    ),
}
"""What the rarest plans ask for, in the words of `NormPlan`: how a refusal says it, and whether a layer needs it."""


def missing_kernel(layer: LayerSpec, steps: Collection[str], rare: Collection[str] = ()) -> str | None:
    """Why a backend without kernels for some of the rarest plans refuses a layer, as `can_run` says it; None if it need not.

    Args:
        steps: the names of the step functions that the backend has kernels for.
        rare: the keys of `RARE` that it has kernels for.
    """
    phrases = {what: is_needed(layer) for name, (what, is_needed) in RARE.items() if name not in rare}
    phrases[f"the {layer.step} step"] = layer.step not in steps
    return next((f"it has no kernel for {what}" for what, is_needed in phrases.items() if is_needed), None)
