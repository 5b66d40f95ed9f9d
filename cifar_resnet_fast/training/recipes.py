"""Named recipes: what each one sets other than the defaults of ``TrainConfig`` (layer 2).

``paper`` is the defaults. ``fast`` and ``best`` are starting points that no measurement with this
package has confirmed yet.
"""

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "fast": {
        "epochs": 48,
        "batch_size": 1024,
        "lr": 1.2,
        "nesterov": True,
        "weight_decay": 5e-4,
        "decay_weights_only": True,
        "schedule": "linear",
        "final_lr": 0.05,
        "warmup_epochs": 3.0,
        "flip": "alternating",
        "zero_init_last": True,
        "ema": 0.99,
        "ema_start": 16.0,
    },
    "best": {
        "epochs": 160,
        "batch_size": 512,
        "lr": 0.8,
        "nesterov": True,
        "weight_decay": 5e-4,
        "decay_weights_only": True,
        "schedule": "cosine",
        "warmup_epochs": 5.0,
        "flip": "alternating",
        "cutout": 16,
        "mixup": 1.0,
        "unmixed_epochs": 20,
        "ema": 0.999,
    },
}
