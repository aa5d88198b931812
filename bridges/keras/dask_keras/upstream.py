"""Every private name of Keras that we touch, and nothing else.

Checked against Keras 3.15.
"""

from __future__ import annotations

from typing import Any

__all__ = ["in_order", "output_losses"]


def in_order(model: Any, logs: dict[str, Any]) -> Any:
    """The values of `logs` as ``model.evaluate`` returns them: a list in its order, or one value alone.

    Would be retired by a public way from the dict of ``get_metrics_result`` to that list; ``metrics_names``, which is
    public, has one name for all compiled metrics together.
    """
    return model._flatten_metrics_in_order(logs)


def output_losses(model: Any) -> list[Any]:
    """The running means of each output's loss, of a compiled model with several; ``metrics`` has them among others.

    Would be retired by means that count rows on every backend: ``CompileLoss.call`` weights them by
    ``y_pred.shape[0]``, which is None in a compiled function of TensorFlow, so that they count batches there.
    """
    loss = model._compile_loss
    return [] if loss is None else list(loss.metrics)
