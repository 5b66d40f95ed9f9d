"""Named recipes: their settings, and how these change with the length of a run (layer 2).

``paper`` is the defaults of ``TrainConfig``. ``fast`` and ``best`` are starting points that no
measurement with this package has confirmed yet.
"""

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {
        "epochs": 160,
        "batch_size": 1024,
        "lr": 1.2,
        "schedule": "step",
        "warmup_epochs": 5.0,
        "milestones": (80, 120),
    },
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


def settings_of(recipe: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recipe, adapted to the given ones, which stay unchanged.

    With other epochs than the recipe's, its warm-up, milestones, start of the average and unmixed
    epochs keep their share of the run (milestones and unmixed epochs are rounded), and the average
    reaches back over the same share of it. With another batch size the learning rate changes in
    proportion, and the average reaches back over as many images as before. A setting of the recipe
    that has no meaning without another one, such as the start of an average, is left out if that
    one is switched off.

    Args:
        recipe: one of ``RECIPES``
        given: settings by name

    Source: Goyal et al. 2017, section 2.1 (learning rate); Busbridge et al. 2023 (decay of
    an average).
    """
    own = dict(RECIPES[recipe])
    longer = given.get("epochs", own["epochs"]) / own["epochs"]
    larger = given.get("batch_size", own["batch_size"]) / own["batch_size"]
    if longer > 0 and longer != 1:
        for name in ("warmup_epochs", "ema_start"):
            own[name] = own.get(name, 0.0) * longer
        own["unmixed_epochs"] = round(own.get("unmixed_epochs", 0) * longer)
        shifted = {max(round(epoch * longer), 1) for epoch in own.get("milestones", ())}
        own["milestones"] = tuple(sorted(shifted))
    if larger > 0:
        own["lr"] *= larger
    if longer > 0 and larger > 0 and "ema" in own:
        own["ema"] **= larger / longer
    settings = {**own, **given}
    needless = (
        ("ema_start", not settings.get("ema")),
        ("unmixed_epochs", not settings.get("mixup") and not settings.get("cutmix")),
        ("final_lr", settings["schedule"] == "step"),
        ("nesterov", settings.get("momentum") == 0),
    )
    for name, is_needless in needless:
        if is_needless and name not in given:
            settings.pop(name, None)
    return settings
