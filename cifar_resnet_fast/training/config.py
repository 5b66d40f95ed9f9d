"""The settings of a training: a frozen dataclass whose fields become the flags (layer 2)."""

import argparse
import dataclasses
import itertools
import json
import math
import re
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cifar_resnet_fast import ops
from cifar_resnet_fast.data.datasets import NAMES
from cifar_resnet_fast.data.loader import CROP_PADDING, FLIPS, PADDING_MODES
from cifar_resnet_fast.errors import first_line
from cifar_resnet_fast.resnet import SHORTCUTS, check_depth
from cifar_resnet_fast.training.recipes import RECIPES, settings_of
from cifar_resnet_fast.training.schedules import SCHEDULES


def _flag(
    default: Any, help: str, choices: tuple[str, ...] | None = None, metavar: str | None = None
) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar})


# far above any useful value, and below the limits of memory, clocks and float32
_MOST = {
    "depth": 12_002,
    "width": 100,
    "epochs": 1_000_000,
    "cutout": 32,
    "weight_decay": 1e6,
    "timeout": 1e6,
    "lr": 1e30,
    "warmup_epochs": 1e9,
    "runs": 10_000,
}


@dataclass(frozen=True)
class TrainConfig:
    """What a training does and where. Each field becomes a command-line flag.

    Raises:
        ValueError: a value breaks its rule; names the field, the rule and the value
    """

    depth: int = _flag(
        20,
        "number of layers, 6n + 2; the paper has 20, 32, 44, 56, 110 and 1202",
        metavar="N",
    )
    shortcut: str = _flag(
        "A",
        "shortcut of the two blocks that change the shape: A has no parameters; B is a 1x1 "
        "convolution and a normalisation, and a network with it runs layer by layer",
        SHORTCUTS,
    )
    width: int = _flag(
        1, "multiply the paper's 16, 32 and 64 channels by this number", metavar="N"
    )
    dataset: str = _flag(
        "auto",
        f"{', '.join(NAMES)}, an .npz file or a folder; auto is cifar10, or shapes (drawn, no "
        "download) if CIFAR-10 is not there and cannot be downloaded in five minutes",
        metavar="NAME",
    )
    data_root: str = _flag("data", "folder for downloaded data sets", metavar="FOLDER")
    data_url: str | None = _flag(
        None,
        "address to download the data set from, instead of the known sources: that of its file "
        "or, ending with /, that of a folder with its files",
    )
    normalization: str = _flag(
        "dataset",
        "normalise with the mean and standard deviation of the data set's own training images, or "
        "with ImageNet's, which some published CIFAR checkpoints were trained with",
        ("dataset", "imagenet"),
    )
    validation: int = _flag(
        0,
        "number of training images to hold out and evaluate instead of the test set (the paper: "
        "5000)",
        metavar="N",
    )
    limit: int | None = _flag(None, "use only the first N images of each split", metavar="N")

    recipe: str = _flag(
        "paper",
        "named settings, which the other flags change one by one. If --epochs is given too, the "
        "recipe's warm-up, milestones, start of the average and unmixed epochs keep their share "
        "of the run; if --batch-size is, its learning rate changes in proportion",
        tuple(RECIPES),
    )
    epochs: int = _flag(160, "number of passes over the training images", metavar="N")
    batch_size: int = _flag(
        1024,
        "images per step, over all processes; the partial batch at the end of an epoch is dropped",
        metavar="N",
    )
    batch_size_per_process: int | None = _flag(
        None, "images per step and process, instead of --batch-size", metavar="N"
    )
    lr: float = _flag(1.2, "peak learning rate")
    optimizer: str = _flag(
        "sgd",
        "optimiser of the 3x3 convolutions; muon has no weight decay, and SGD trains the other "
        "parameters",
        ("sgd", "muon"),
    )
    muon_lr: float = _flag(
        0.24,
        "peak learning rate of muon, which follows the same schedule; another batch size than the "
        "recipe's does not change it",
    )
    momentum: float = _flag(0.9, "momentum of SGD and muon", metavar="FACTOR")
    nesterov: bool = _flag(False, "use Nesterov's momentum instead of the plain one")
    weight_decay: float = _flag(1e-4, "weight decay of SGD, on all parameters")
    decay_weights_only: bool = _flag(
        False, "leave the normalisations' parameters and the biases without weight decay"
    )
    norm_bias_lr_factor: float = _flag(
        1.0,
        "multiply the learning rate of the normalisations' biases by this number, and divide "
        "their weight decay by it",
        metavar="FACTOR",
    )
    schedule: str = _flag(
        "step",
        "how the learning rate falls after the warm-up: to a tenth at each milestone or gradually",
        SCHEDULES,
    )
    warmup_epochs: float = _flag(
        5.0, "number of epochs over which the learning rate rises to its peak", metavar="N"
    )
    milestones: tuple[int, ...] = _flag(
        (80, 120),
        "epochs at which the learning rate drops to a tenth, with --schedule step",
        metavar="EPOCH",
    )
    final_lr: float = _flag(
        0.0,
        "learning rate at the end of the run as a share of its peak, with the other schedules",
        metavar="SHARE",
    )
    clip: float = _flag(
        0.0, "largest norm of the gradient over all parameters (0: no limit)", metavar="NORM"
    )
    lookahead: int = _flag(
        0,
        "number of steps after which Lookahead moves its slow weights towards the trained ones "
        "and training continues from there (0: off)",
        metavar="STEPS",
    )
    lookahead_share: float = _flag(
        0.5, "share of the way that the slow weights move, more than 0 and at most 1"
    )
    label_smoothing: float = _flag(
        0.0, "label smoothing of the training loss, at least 0 and less than 1", metavar="SHARE"
    )
    flip: str = _flag(
        "random",
        "mirror each training image at random, or in every second epoch",
        FLIPS,
    )
    crop_padding: int = _flag(
        CROP_PADDING,
        "number of pixels added on each side of a training image before its random crop",
        metavar="PIXELS",
    )
    padding_mode: str = _flag(
        "zeros",
        "make these pixels black, or reflect the image at its border",
        PADDING_MODES,
    )
    trivial_augment: bool = _flag(
        False,
        "change each training image before its crop by one operation of TrivialAugment's wide "
        "space, in plain PyTorch on every device",
    )
    cutout: int = _flag(
        0, "side of the square removed from each training image (0: off)", metavar="PIXELS"
    )
    mixup: float = _flag(
        0.0,
        "blend each training image with another one: parameter of the Beta distribution from "
        "which the share is drawn, up to 1 (0: off); if --cutmix is given too, each step uses one "
        "of the two",
        metavar="ALPHA",
    )
    cutmix: float = _flag(
        0.0,
        "paste a box of another image into each training image: parameter of the Beta "
        "distribution from which its share is drawn, up to 1 (0: off)",
        metavar="ALPHA",
    )
    unmixed_epochs: int = _flag(
        0, "number of epochs at the end of the run without --mixup and --cutmix", metavar="N"
    )
    ema: float = _flag(
        0.0,
        "decay per step of the average of the weights that is evaluated (0: no average)",
        metavar="DECAY",
    )
    ema_start: float = _flag(
        0.0,
        "number of epochs after which the average starts, as a copy of the weights",
        metavar="EPOCHS",
    )
    ema_floor: float | None = _flag(
        None,
        "lowest decay of the average, which then rises to --ema as (1 + n) / (10 + n) after n "
        "steps (default: --ema from the first step on)",
        metavar="DECAY",
    )
    zero_init_last: bool = _flag(
        False, "start the last normalisation of each block with scale 0 instead of 1"
    )
    evaluate_every: int = _flag(
        1, "number of epochs between evaluations; the last epoch is always evaluated", metavar="N"
    )
    tta: str = _flag(
        "none",
        "flip adds the accuracy of predictions averaged over each image and its mirror image",
        ("none", "flip"),
    )
    seed: int = _flag(0, "seed of the initial weights and of every random draw", metavar="N")
    runs: int = _flag(1, "number of runs, with consecutive seeds starting at --seed", metavar="N")
    sweep: tuple[str, ...] = _flag(
        (),
        "train with each combination of these settings, such as lr=0.6,1.2 weight-decay=0,1e-4",
        metavar="NAME=VALUES",
    )
    at_once: str | None = _flag(
        None,
        "with --runs or --sweep: number of networks that train at the same time on one GPU, or "
        "auto for as many as fit into its memory",
        metavar="N",
    )

    dtype: str = _flag(
        "auto",
        "data type of the activations; auto is fp16 on a GPU and fp32 on a CPU",
        ("auto", "fp32", "bf16", "fp16"),
    )
    loss_scale: float | None = _flag(
        None,
        "factor on the loss in the backward pass (default: 1024 in fp16, otherwise 1); a step "
        "whose gradients overflow is skipped and counted",
        metavar="FACTOR",
    )
    sync_bn: bool = _flag(
        False,
        "normalise over the images of all processes, in plain PyTorch, instead of over those of "
        "each process",
    )
    timeout: float = _flag(
        300.0, "number of seconds to wait for a process that does not answer", metavar="SECONDS"
    )
    device: str = _flag(
        "auto", "device to run on; auto is the GPU if there is one", ("auto", "cpu", "cuda")
    )
    implementation: str = _flag(
        "auto",
        "implementation of the layers; auto is the fastest that can run",
        ("auto", *ops.IMPLEMENTATIONS),
    )

    out: str | None = _flag(
        None,
        "folder of the run, new or empty (default: a new folder in runs/)",
        metavar="FOLDER",
    )
    config: str | None = _flag(
        None,
        "config.json of a run, whose settings the other flags change one by one",
        metavar="FILE",
    )
    resume: str | None = _flag(
        None, "folder of a stopped run, which continues with its own settings", metavar="FOLDER"
    )
    eval: str | None = _flag(
        None,
        "checkpoint to evaluate on the test set, without training; --dataset may be a folder of "
        "test sets, such as CIFAR-10-C's .npy files",
        metavar="CHECKPOINT",
    )
    mean: str | None = _flag(
        None,
        "with --eval and --std: mean of each channel, such as 0.4914,0.4822,0.4465",
        metavar="R,G,B",
    )
    std: str | None = _flag(
        None, "with --eval and --mean: standard deviation of each channel", metavar="R,G,B"
    )
    predictions: str | None = _flag(
        None, "with --eval: .csv file for the predictions, one row per image", metavar="FILE"
    )
    confusion: str | None = _flag(
        None, "with --eval: .png file for a drawing of the confusion matrix", metavar="FILE"
    )
    tensorboard: bool = _flag(False, "write TensorBoard events into the run's folder too")
    profile: bool = _flag(
        False,
        "write a trace of five steps into the run's folder, for chrome://tracing or Perfetto",
    )
    no_selfcheck: bool = _flag(
        False, "skip the check of the kernels before the first run with a card and a build"
    )

    def __post_init__(self):
        check_depth(self.depth)
        for name in ("dataset", "data_root", *PLACES):  # an unset shell variable gives ""
            self._check(
                name,
                lambda v: not isinstance(v, str) or bool(v.strip()),
                "a name that is not empty",
            )
        for name, minimum in (
            ("width", 1),
            ("epochs", 1),
            ("batch_size", 1),
            ("runs", 1),
            ("limit", 1),
            ("batch_size_per_process", 1),
            ("evaluate_every", 1),
        ):
            self._check(name, _at_least(minimum), f"at least {minimum}")
        for name in (
            "validation",
            "warmup_epochs",
            "weight_decay",
            "cutout",
            "ema_start",
            "clip",
            "lookahead",
            "unmixed_epochs",
        ):
            self._check(name, lambda v: v >= 0 and math.isfinite(v), "0 or more")
        self._check(
            "momentum",
            lambda v: v > 0 or self.optimizer != "muon",
            "more than 0 with optimizer muon",
        )
        for name in ("lr", "muon_lr", "timeout"):
            self._check(name, lambda v: v > 0 and math.isfinite(v), "more than 0")
        for name, most in _MOST.items():
            self._check(name, _at_most(most), f"at most {most}")
        self._check(
            "sync_bn",
            lambda v: not v or self.implementation in ("auto", "reference"),
            f"off with implementation {self.implementation}",
        )
        if self.implementation == "cuda":
            self._check("shortcut", lambda v: v == "A", "A with implementation cuda")
            self._check("width", lambda v: v == 1, "1 with implementation cuda")
        self._check(
            "dtype",
            lambda v: v != "fp32" or self.implementation != "cuda",
            "fp16, bf16 or auto with implementation cuda",
        )
        self._check(
            "loss_scale", lambda v: v is None or (v > 0 and math.isfinite(v)), "more than 0"
        )
        self._check("nesterov", lambda v: not v or self.momentum > 0, "off if momentum is 0")
        for name in ("momentum", "label_smoothing", "ema"):
            self._check(name, lambda v: 0 <= v < 1, "at least 0 and less than 1")
        for name in ("mixup", "cutmix"):
            self._check(name, lambda v: 0 <= v <= 1, "in 0 .. 1")
            self._check(
                name,
                lambda v: v == 0 or self.batch_size > 1,
                "0 with batches of one image, which have no partner",
            )
        self._check(
            "padding_mode",
            lambda v: v == "zeros" or self.crop_padding > 0,
            "zeros with a crop padding of 0",
        )
        self._check(
            "unmixed_epochs",
            lambda v: v == 0 or ((self.mixup > 0 or self.cutmix > 0) and v < self.epochs),
            f"less than the {self.epochs} epochs, and left out without mixup and cutmix",
        )
        self._check("crop_padding", lambda v: 0 <= v < 32, "in 0 .. 31")
        self._check("norm_bias_lr_factor", lambda v: 1e-6 <= v <= 1e6, "in 1e-6 .. 1e6")
        self._check("final_lr", lambda v: 0 <= v <= 1, "a share of the peak, 0 .. 1")
        self._check(
            "final_lr",
            lambda v: v == 0 or self.schedule != "step",
            "left out with schedule step",
        )
        self._check(
            "warmup_epochs",
            lambda v: v < self.epochs or self.schedule == "step",
            f"less than the {self.epochs} epochs with schedule {self.schedule}",
        )
        self._check(
            "ema_start",
            lambda v: v == 0 or (self.ema > 0 and v < self.epochs),
            f"less than the {self.epochs} epochs, and left out without ema",
        )
        self._check(
            "ema_floor",
            lambda v: v is None or 0 <= v < self.ema,
            f"at least 0 and less than ema {self.ema}",
        )
        self._check("lookahead_share", lambda v: 0 < v <= 1, "more than 0 and at most 1")
        self._check("seed", lambda v: 0 <= v < 2**63, "in 0 .. 2**63 - 1")
        self._check(
            "milestones",
            lambda v: list(v) == sorted(set(v)) and min(v, default=1) > 0,
            "rising epochs, each at least 1",
        )
        self._check(
            "at_once",
            lambda v: v is None or re.fullmatch(r"auto|0*[1-9][0-9]{0,8}", str(v)),
            "auto or a number of at least 1",
        )
        if self.sweep:
            self._check_sweep()
        for item in dataclasses.fields(self):
            choices = item.metadata["choices"]
            if choices:
                self._check(item.name, choices.__contains__, f"one of {', '.join(choices)}")

    def _check(self, name: str, obeys: typing.Callable[[Any], object], rule: str) -> None:
        value = getattr(self, name)
        if not obeys(value):
            raise ValueError(f"{name} must be {rule}, got {value!r}")

    def _check_sweep(self) -> None:
        names, count = [], 1
        for item in self.sweep:
            name, texts = _swept(item)
            if name not in SWEPT:
                raise ValueError(
                    f"sweep must have name=value,value with names of {', '.join(SWEPT)}, "
                    f"got {item!r}"
                )
            values = []
            for text in texts:
                try:
                    values.append(_value_of(name, text))
                except ValueError:
                    raise ValueError(f"sweep must have values for {name}, got {text!r}") from None
            if len(set(values)) < len(values) or name in names:
                raise ValueError(f"sweep must have each name and value once, got {item!r}")
            names.append(name)
            count *= len(values)
        if count > _MOST_COMBINATIONS:
            raise ValueError(
                f"sweep must have at most {_MOST_COMBINATIONS} combinations, got {count}"
            )
        most = _MOST["runs"] // count
        self._check("runs", lambda v: v <= most, f"at most {most} for {count} combinations")
        for setting in self.settings():
            try:
                self._with_setting(setting)
            except ValueError as error:
                raise ValueError(f"sweep: {error}") from None

    def settings(self) -> list[dict[str, str]]:
        """Each combination of the sweep, as the texts that were given; without a sweep a single
        empty one."""
        swept = [_swept(item) for item in self.sweep]
        names = [name for name, _ in swept]
        texts = itertools.product(*(texts for _, texts in swept))
        return [dict(zip(names, combination, strict=True)) for combination in texts]

    def _with_setting(self, setting: dict[str, str]) -> "TrainConfig":
        values = {name: _value_of(name, text) for name, text in setting.items()}
        return dataclasses.replace(self, **values, runs=1, sweep=(), at_once=None)

    def members(self) -> dict[str, "TrainConfig"]:
        """The single runs of a config of several, by the name of their folder; the seeds of a
        combination are consecutive."""
        return {
            name_of_setting(setting, seed): dataclasses.replace(
                self._with_setting(setting), seed=seed
            )
            for setting in self.settings()
            for seed in range(self.seed, self.seed + self.runs)
        }

    @property
    def several(self) -> bool:
        """Whether this is more than one run, or a sweep."""
        return self.runs > 1 or bool(self.sweep)

    def check_at_once(self, runs: int, processes: int) -> None:
        """Raise ValueError unless ``at_once`` fits the number of runs, the number of processes
        and the other settings."""
        if self.at_once is None:
            return
        self._check(
            "at_once",
            lambda v: v == "auto" or int(v) <= runs,
            f"at most the number of runs, {runs}",
        )
        self._check(
            "at_once", lambda _: processes == 1, f"left out with {processes} processes, not one"
        )
        self._check("at_once", lambda _: not self.profile, f"left out with {flag_of('profile')}")

    @classmethod
    def of_recipe(cls, recipe: str, **changes: Any) -> "TrainConfig":
        """The settings of a named recipe, one of ``RECIPES``, with some of them changed.

        ``recipes.settings_of`` says what changes with the number of epochs or the batch size.
        """
        if recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
        return cls(recipe=recipe, **settings_of(recipe, changes))

    def to_dict(self) -> dict[str, Any]:
        """The settings of the training as plain values for config.json, without those of the
        call."""
        values = dataclasses.asdict(self)
        for name in PLACES:
            del values[name]
        lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        return {**values, **lists}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """The inverse of ``to_dict``. Raises ValueError for unknown names and wrong types."""
        types = typing.get_type_hints(cls)
        for name, value in values.items():
            if name not in types or name in PLACES:
                raise ValueError(f"config has an unknown setting {name!r}")
            if not _is_of(value, types[name]):
                raise ValueError(f"{name} must be of type {types[name]}, got {value!r}")
        tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**{"milestones": (), **values, **tuples})


# settings that a sweep may change: none of them changes the shape of a tensor, or the data set
SWEPT = (
    "lr",
    "momentum",
    "nesterov",
    "weight_decay",
    "decay_weights_only",
    "norm_bias_lr_factor",
    "schedule",
    "warmup_epochs",
    "final_lr",
    "label_smoothing",
    "flip",
    "crop_padding",
    "padding_mode",
    "trivial_augment",
    "cutout",
    "mixup",
    "cutmix",
    "unmixed_epochs",
    "ema",
    "ema_start",
    "zero_init_last",
    "loss_scale",
)
_MOST_COMBINATIONS = 1000


def _at_least(low: float) -> typing.Callable[[Any], bool]:
    return lambda value: value is None or value >= low


def _at_most(high: float) -> typing.Callable[[Any], bool]:
    return lambda value: value <= high


def _swept(item: str) -> tuple[str, list[str]]:
    """The setting and its values, as texts, of ``name=value,value``."""
    name, _, values = item.partition("=")
    return name.strip().replace("-", "_"), [text.strip() for text in values.split(",")]


def _value_of(name: str, text: str) -> Any:
    """The value of a setting from a text; ValueError if the text is not one."""
    hint = typing.get_type_hints(TrainConfig)[name]
    kind = next(t for t in typing.get_args(hint) or (hint,) if t is not None)
    if kind is bool:
        if text not in ("true", "false"):
            raise ValueError(f"{name} must be true or false, got {text!r}")
        return text == "true"
    return kind(text)


def name_of_setting(setting: dict[str, str], seed: int | None = None) -> str:
    """The name of a combination, or with a seed that of its run's folder, such as
    ``lr=0.6_weight-decay=1e-4_seed-0``."""
    parts = [f"{flag_of(name).removeprefix('--')}={text}" for name, text in setting.items()]
    return "_".join(parts + ([] if seed is None else [f"seed-{seed}"]))


# settings of the call, not of the training
PLACES = (
    "data_url",
    "out",
    "config",
    "resume",
    "eval",
    "mean",
    "std",
    "predictions",
    "confusion",
    "profile",
    "no_selfcheck",
)


# the groups of --help, with the fields of each
GROUPS = {
    "model": ("depth", "shortcut", "width", "zero_init_last"),
    "data": ("dataset", "data_root", "data_url", "normalization", "validation", "limit"),
    "optimisation": (
        "recipe",
        "epochs",
        "batch_size",
        "batch_size_per_process",
        "lr",
        "optimizer",
        "muon_lr",
        "momentum",
        "nesterov",
        "weight_decay",
        "decay_weights_only",
        "norm_bias_lr_factor",
        "schedule",
        "warmup_epochs",
        "milestones",
        "final_lr",
        "clip",
        "lookahead",
        "lookahead_share",
        "label_smoothing",
        "ema",
        "ema_start",
        "ema_floor",
    ),
    "augmentation": (
        "flip",
        "crop_padding",
        "padding_mode",
        "trivial_augment",
        "cutout",
        "mixup",
        "cutmix",
        "unmixed_epochs",
    ),
    "seeds and runs": ("seed", "runs", "sweep", "at_once"),
    "precision and devices": (
        "dtype",
        "loss_scale",
        "sync_bn",
        "timeout",
        "device",
        "implementation",
        "no_selfcheck",
    ),
    "evaluation": (
        "evaluate_every",
        "tta",
        "eval",
        "mean",
        "std",
        "predictions",
        "confusion",
    ),
    "output": ("out", "config", "resume", "tensorboard", "profile"),
}


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value from JSON fits the type of a field."""
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list) and all(
            type(item) is typing.get_args(hint)[0] for item in value
        )
    allowed = typing.get_args(hint) or (hint,)
    return type(value) in allowed or (float in allowed and type(value) is int)


def parse_flags(arguments: list[str] | None = None) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings of a command line, and those among them that were given on it.

    Raises:
        ValueError: as ``TrainConfig``; or a flag is unknown, or its value has the wrong type
    """
    parser = _Parser(
        prog="python -m cifar_resnet_fast.train",
        description='Train a CIFAR ResNet (He et al. 2015). The defaults are the "paper" recipe: '
        "160 epochs of SGD with batches of 1024 images.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    group_of = {name: groups[title] for title, names in GROUPS.items() for name in names}
    hints = typing.get_type_hints(TrainConfig)
    for item in dataclasses.fields(TrainConfig):
        options: dict[str, Any] = {"help": item.metadata["help"]}
        hint = hints[item.name]
        if hint is bool:
            # a flag whose name begins with --no has no opposite
            negative = item.name.startswith("no_")
            options["action"] = "store_true" if negative else argparse.BooleanOptionalAction
        elif typing.get_origin(hint) is tuple:
            metavar = item.metadata["metavar"]
            options |= {"type": typing.get_args(hint)[0], "nargs": "*", "metavar": metavar}
        else:
            options["type"] = next(t for t in typing.get_args(hint) or (hint,) if t is not None)
            options["choices"] = item.metadata["choices"]
            if not options["choices"]:
                last_word = item.name.split("_")[-1].upper()
                options["metavar"] = item.metadata["metavar"] or last_word
        if item.default not in (None, ()) and hint is not bool:
            shown: Any = item.default
            if isinstance(shown, tuple):
                shown = " ".join(map(str, shown))
            options["help"] += f" (default: {shown})"
        group_of[item.name].add_argument(flag_of(item.name), **options)
    arguments = sys.argv[1:] if arguments is None else arguments
    # argparse removes the -- of --flag=--, which is then without a value
    empty = next(
        (text for text in arguments if text.startswith("--") and text[2:].endswith("=--")), None
    )
    if empty is not None:
        raise ValueError(f"{empty.removesuffix('=--')} must have a value, got '--'")
    given = vars(parser.parse_args(arguments))
    given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    if "config" in given:
        for name in ("recipe", "resume", "eval"):
            if name in given:
                raise ValueError(
                    f"{name} must be left out with {flag_of('config')}, got {given[name]}"
                )
        config = dataclasses.replace(_read_config(given["config"]), **given)
    else:
        config = (TrainConfig.of_recipe if "recipe" in given else TrainConfig)(**given)
    # not a rule of the settings, in which these have a value in any case
    for name, has_use, need in (
        ("muon_lr", config.optimizer == "muon", f"{flag_of('optimizer')} muon"),
        ("lookahead_share", config.lookahead > 0, flag_of("lookahead")),
    ):
        if name in given and not has_use and "resume" not in given:
            raise ValueError(f"{name} must be left out without {need}, got {given[name]}")
    return config, given


def _read_config(path: str) -> TrainConfig:
    try:
        return TrainConfig.from_dict(json.loads(Path(path).read_text()))
    except (ValueError, AttributeError, RecursionError, OSError) as error:
        reason = first_line(error)
        raise ValueError(f"config must be a run's config.json, got {path}: {reason}") from None


class _Parser(argparse.ArgumentParser):
    """Print one-line errors; the full usage is in --help."""

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(message.removeprefix("argument "))


def flag_of(name: str) -> str:
    """The flag of a field: ``--batch-size`` of ``batch_size``."""
    return "--" + name.replace("_", "-")


def with_flag_name(message: str) -> str:
    """An error of the library, which begins with an argument's name, in terms of the flags."""
    names = "|".join(item.name for item in dataclasses.fields(TrainConfig))
    return re.sub(rf"^({names})\b", lambda match: flag_of(match[0]), message)
