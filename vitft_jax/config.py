"""The configuration of a run: every key with its default, unit and reason, and how files and command lines change them.

A config file is Python with ``get_config()``: it takes `default()`, edits what differs and returns it (see `configs/`).
"""

import ast
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from vitft_jax import tree
from vitft_jax.errors import InputError, nearest

Config = ml_collections.ConfigDict
WHERE = ("mesh.", "remat")
"""Beginnings of the keys that change where or how a run computes, not what."""

ON_RESUME = ("log.", "data.workers", "train.nan_retries", *WHERE)
"""Beginnings of the keys with which a run may go on that was started with others: they change no step that goes well."""

NAMES = ("methods", "data.labels", "figures.names")
"""Keys that are lists of text."""
AT_EVALUATION = ("methods", "skip.", "figures.", *WHERE)
"""Beginnings of the keys that change what is computed, not what was trained: a finished run can be evaluated with others."""

MOST_FIGURES = 60
"""Images in a figure: of more it would be too tall to open."""


def default() -> Config:
    """Returns the defaults, locked: an unknown key is an error."""
    c = Config()
    c.seed = 0  # fixes the split, the order of the images, augmentation, dropout and fresh parameters
    c.dtype = "float32"  # compute: 'float32' or 'bfloat16'; parameters stay float32
    c.methods = ()  # modules of vitft_jax.methods, inner to outer, such as ('lora',)
    c.init_adapter = (
        ""  # folder of a PEFT adapter to start from; it decides rank, alpha and targets, see docs/export.md
    )
    c.remat = (
        "none"  # computed again for gradients, to save memory: 'dots' all but products with weights, 'full' blocks
    )

    c.mesh = h = Config()
    h.data = 0  # devices that each batch is cut over; 0 = all that `model` leaves
    h.model = 1  # devices that each linear layer of the blocks is cut over; it divides the number of heads
    h.fsdp = False  # cut weights and optimiser state over `data` too, and gather them where they are used

    c.data = d = Config()
    d.source = (
        ""  # 'phantom' (generated), 'folder', 'tfds' or 'npz' (MedMNIST); '' = what `path` is, without one phantom
    )
    d.path = ""  # the folder of images; tfds: the data_dir ('' = TFDS's own) or one prepared dataset; npz: the file
    d.table = ""  # folder: CSV with path, label (or the columns in `labels`), group, split; '' = a sub-folder per class
    d.name = ""  # tfds: 'dataset/config:1.0.0', '' = `path` is the dataset; phantom: 'source', 'target' (''), 'video'
    d.labels = ()  # names of 0/1 columns or features: several labels an image; npz: names of the classes
    d.image_size = 0  # side of the square input, pixels; 0 = that of the weights, or 224 for random ones
    d.fit = "squash"  # 'squash' keeps the whole field of view, 'crop' the aspect ratio, 'pad' both
    d.val_fraction = 0.1  # share of the images, in whole groups, where the table has no split
    d.test_fraction = 0.2
    d.links = False  # folder: take images that links bring in from outside it; only where you trust the whole folder
    d.workers = 0  # processes that read images; 0 = threads of this one, right for small image sets

    c.augment = a = Config()  # of training images; ultrasound has an up and a down, so nothing flips vertically
    a.crop = 0.7  # smallest share of the area that a random crop keeps; 1 = off
    a.flip = 0.5  # probability of a horizontal flip
    a.rotate = 10.0  # largest rotation, degrees
    a.gain = 0.15  # largest relative change of brightness
    a.contrast = 0.15  # largest relative change of contrast
    a.speckle = 0.0  # largest added speckle, standard deviation over mean of the echo, such as 0.2; 0 = off
    a.tgc = 0.0  # largest relative change of brightness with depth, as by time-gain sliders, such as 0.2; 0 = off
    a.mixup = 0.0  # alpha of the Beta distribution of an image's share when pairs are blended, such as 0.2; 0 = off
    a.cutmix = 0.0  # the same when pairs exchange a box, such as 1; with both on, each batch gets one of them; 0 = off

    c.model = m = Config()
    m.pretrained = "bundled"  # a directory or file of weights, a run of train, or a Hugging Face Hub id; '' = random
    m.revision = ""  # commit, tag or branch of a Hub id; '' = its main branch, and the run records the commit
    m.name = ""  # a key of vit.VARIANTS; '' = as the weights say
    m.features = ""  # input of the head: 'cls', 'mean' or 'cls+mean'; '' = as the weights say

    c.train = t = Config()
    t.trainable = "^head"  # regex on names in `params` that train beside the adapters; '.' = all of them, '$^' = none
    t.epochs = 10.0
    t.steps = 0  # optimiser steps; 0 = as many as `epochs` asks for
    t.batch_size = 16  # images per optimiser step, over all devices and micro-batches
    t.accumulate = 1  # micro-batches that a batch is cut into, to save memory
    t.lr = 5e-4  # peak learning rate
    t.warmup = 0.1  # share of the steps with a rising learning rate; it falls to 0 along a cosine afterwards
    t.weight_decay = 0.01  # AdamW, on kernels in `params` only: decay on adapters would pull towards no change at all
    t.clip = 1.0  # largest global norm of the gradient; 0 = off
    t.label_smoothing = 0.0
    t.class_weights = False  # weigh classes by their inverse frequency in the training split
    t.balanced = False  # draw every class (label, or none) equally often; probabilities then favour the rare ones
    t.focal_gamma = 0.0  # focal loss: (1 - p)^gamma times the loss, so easy images count less, such as 2; 0 = off
    t.thresholds = "f1"  # of labels, chosen on validation: the best 'f1' of each, 'youden' (sens. + spec.), or 'half'
    t.best_metric = "auroc"  # of the validation split; chooses the checkpoint that is kept as best
    t.patience = 0  # epochs without a better `best_metric` before the run stops; 0 = never
    t.nan_retries = (
        0  # times that a loss that is not finite brings the run back to its last checkpoint, at half the `lr`
    )

    c.lora = lo = Config()  # of all its variants: lora, dora, pissa
    lo.rank = 8
    lo.alpha = 16.0  # the change of a kernel is alpha / rank * A B
    lo.targets = "qv"  # 'qv', 'qkv', 'encoder' (all linear layers of the blocks), or a regex on layers' paths
    lo.dropout = 0.0  # of the adapter's input
    lo.rank_pattern = ()  # ((regex, rank), ...): other ranks for some layers, 0 for none; first match wins
    lo.rs = False  # rsLoRA: scale by alpha / sqrt(rank)
    lo.lr_ratio = 1.0  # LoRA+: learning rate of B over that of A

    c.adalora = ad = Config()
    ad.init_r = 12  # rank of every adapter at the start; 12 and 8 are PEFT's
    ad.target_r = 8  # mean rank at the end; equal to `init_r` = nothing is pruned
    ad.alpha = 24.0  # the change of a kernel is alpha / init_r * Q diag(lam) P; the scale 2 of LoRA's defaults
    ad.targets = "qkv"  # as lora.targets; rank moves among all of these layers
    ad.t_init = 0.1  # share of the steps before ranks fall: as long as the learning rate rises
    ad.t_final = 0.4  # share of the steps with final ranks, at the end; the best checkpoint is one of these
    ad.delta_t = 1  # optimiser steps between allocations; 1 fits a run of any length
    ad.penalty = 0.5  # weight of the orthogonality penalty; PEFT's
    ad.importance_at = "post"  # weights in the importance: 'post' the step, as in PEFT, or 'pre', as in the paper

    c.skip = s = Config()
    s.layers = (6, 8)  # blocks, from 0, after which patch tokens leave
    s.drop_ratio = (0.35,)  # share of the patch tokens there that leaves; one for all splits, or one each
    s.keep = ()  # number of patch tokens that go on, in place of the ratio; one for all splits, or one each
    s.rejoin = ()  # block before which they come back unchanged, None = never; one for all, or one each; () = all never
    s.fuse = False  # append the sum of score times token over those that leave, as EViT does
    s.mode = "gather"  # 'mask' computes the same without saving anything: a reference
    s.warmup = 0.0  # share of the steps in which the kept share falls to its value, in 4 stairs; 0 = none

    c.figures = f = Config()  # pictures of what a method does, such as the patches that skip, in RUN/figures
    f.count = 8  # images of the test split, evenly spread over it; 0 = none, at most 60
    f.names = ()  # these images instead, by their path in the data

    c.log = g = Config()  # where the numbers of training go besides RUN/metrics.jsonl, see loggers.py
    g.tensorboard = False  # TensorBoard events in RUN/tensorboard; needs the extra `tensorboard`
    g.wandb = ""  # project of Weights & Biases; '' = none; needs the extra `wandb`

    c.quant = q = Config()
    q.bits = 8  # of kernels: 8 or 4 (both stored in int8); activations have 8
    q.weight_only = False  # activations stay in the compute dtype
    q.static = False  # activation ranges fixed beforehand: calibrated before step 0, or by vitft_jax.quantize
    q.attention = False  # also the two products of attention, by int8 scales for each row
    q.base = "float"  # 'float': kernels train (QAT); 'int8': they are frozen, and int8 in memory
    q.skip_layers = "^(embed|head)"  # regex on paths of linear layers that stay in float
    return c.lock()


def load(path: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a config file and applies overrides such as ``lora.rank=16``.

    Raises:
        InputError: The file cannot be read or has no ``get_config()``; a key is unknown; a value has the wrong type.
    """
    if not Path(path).is_file():
        raise InputError(f"--config {path}: no such file; try configs/lora.py")
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or spec.loader is None:
        raise InputError(f"--config {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # no __pycache__ beside a user's file
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except (Exception, SystemExit) as error:  # whatever a user's file raises
        raise InputError(f"--config {path}: {type(error).__name__}: {error}") from error
    finally:
        sys.dont_write_bytecode = writes
    if not isinstance(config, Config):
        raise InputError(f"--config {path}: get_config() returned {type(config).__name__}; return a ConfigDict")
    override(config, overrides)
    return config


def override(config: Config, overrides: Sequence[str], only: tuple[str, ...] = ("",)) -> None:
    """Applies overrides such as ``lora.rank=16``, and checks the result.

    Raises:
        InputError: A key is unknown or begins with none of `only`, or a value has the wrong type or is out of range.
    """
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--config.{text}: write --config.{key}=VALUE")
        set_key(config, key, value)
        if not key.startswith(only):
            raise InputError(
                f"config key {key} belongs to the training of this run; here one can change {', '.join(only)}"
            )
    check(config)


def set_key(config: Config, key: str, text: str) -> None:
    """Sets a key such as 'lora.rank' from text, with the type that its default has.

    Raises:
        InputError: The key is unknown (the message names the nearest), or the text is no value of that type.
    """
    known = _flat(config)
    if key not in known:
        raise InputError(f"unknown config key {key!r}; {nearest(key, known)}")
    old = known[key]
    try:
        # Names that look like numbers, such as classes 2,3, stay names.
        plain = isinstance(old, str) or (key in NAMES and not text.startswith(("(", "[")))
        value = text if plain else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(old, float) and type(value) is int:
        value = float(value)
    if isinstance(old, tuple) and isinstance(value, str):
        value = tuple(part for part in value.split(",") if part)
    elif isinstance(old, tuple) and not isinstance(value, tuple):
        value = tuple(value) if isinstance(value, list) else (value,)
    if type(value) is not type(old):
        raise InputError(f"config key {key}={text!r}: {_kind(old)} is needed, such as {old!r}")
    group, _, leaf = key.rpartition(".")
    (config[group] if group else config)[leaf] = value


def check(config: Config) -> None:
    """Refuses values that no run can have.

    Raises:
        InputError: Names the key, its value and what is allowed.
    """
    allowed = {
        "dtype": ("float32", "bfloat16"),
        "data.fit": ("squash", "crop", "pad"),
        "model.features": ("", "cls", "mean", "cls+mean"),
        "remat": ("none", "dots", "full"),
        "train.thresholds": ("f1", "youden", "half"),
    }
    values = _flat(config)
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"config key {key}={value}: a finite number is needed")
    for key, choices in allowed.items():
        if values[key] not in choices:
            raise InputError(f"config key {key}={values[key]!r}: one of {', '.join(map(repr, choices))}")
    for key in NAMES:
        if wrong := [value for value in values[key] if not isinstance(value, str)]:
            raise InputError(f"config key {key}={values[key]}: {wrong[0]!r} is no text; write {str(wrong[0])!r}")
    lowest = {"data.image_size": 0, "data.workers": 0, "train.batch_size": 1, "train.accumulate": 1, "train.steps": 0}
    lowest |= {
        "train.lr": 0,
        "train.weight_decay": 0,
        "train.clip": 0,
        "train.patience": 0,
        "train.nan_retries": 0,
        "train.focal_gamma": 0,
        "train.epochs": 0,
        "figures.count": 0,
        "mesh.data": 0,
        "mesh.model": 1,
    }
    for key, low in lowest.items():
        if values[key] < low:
            raise InputError(f"config key {key}={values[key]}: at least {low}")
    # Beyond is a slip of the hand, or of figures more than a picture can hold.
    highest = {
        "data.image_size": 2**14,
        "train.batch_size": 2**20,
        "train.steps": 2**31 - 1,
        "figures.count": MOST_FIGURES,
    }
    for key, high in highest.items():
        if values[key] > high:
            raise InputError(f"config key {key}={values[key]}: at most {high}")
    if len(config.figures.names) > MOST_FIGURES:
        raise InputError(f"config key figures.names: {len(config.figures.names)} images; at most {MOST_FIGURES}")
    for key in ("train.warmup", "train.label_smoothing", "data.val_fraction", "data.test_fraction"):
        if not 0 <= values[key] < 1:
            raise InputError(f"config key {key}={values[key]}: at least 0 and below 1")
    for key in ("data.path", "data.table", "model.pretrained", "init_adapter"):
        try:
            Path(values[key]).expanduser()
        except RuntimeError:
            raise InputError(f"config key {key}={values[key]!r}: no user of that name has a home directory") from None
    if not values["train.steps"] and not values["train.epochs"]:
        raise InputError("config keys train.steps and train.epochs are both 0: nothing to train")
    if config.train.class_weights and config.train.balanced:
        raise InputError("config keys train.class_weights and train.balanced both correct for rare classes: choose one")
    if config.train.batch_size % config.train.accumulate:
        raise InputError(
            f"config key train.batch_size={config.train.batch_size} does not divide into "
            f"train.accumulate={config.train.accumulate} micro-batches"
        )


def absolute(config: Config) -> Config:
    """A copy whose paths hold in every working directory, as a run that is written down needs them."""
    config = config.copy_and_resolve_references()
    for group, key in (("data", "path"), ("model", "pretrained")):
        path = Path(config[group][key]).expanduser()
        if config[group][key] not in ("", "bundled") and path.exists():  # what is no path may be an id on the Hub
            config[group][key] = str(path.resolve())
    if config.init_adapter:
        config.init_adapter = str(Path(config.init_adapter).expanduser().resolve())
    return config


def to_json(config: Config) -> str:
    """The resolved config as JSON text."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> Config:
    """Inverse of `to_json`.

    Raises:
        InputError: It is no JSON object, a key is unknown to this version, or a value has the wrong type or is out of range.
    """
    config = default()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"config.json: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError("config.json: expected a JSON object")
    known = _flat(config)
    for key, value in tree.flatten(content).items():
        key, value = key.replace("/", "."), _tuples(value)
        if key not in known:
            raise InputError(f"config.json: unknown key {key!r}; {nearest(key, known)}")
        if type(value) is not type(known[key]):
            raise InputError(f"config.json: {key} is {value!r}; {_kind(known[key])} is needed")
        group, _, leaf = key.rpartition(".")
        (config[group] if group else config)[leaf] = value
    check(config)
    return config


def differences(a: Config, b: Config) -> list[str]:
    """Keys in which two configs differ, each with both values."""
    return [f"{key}: {there!r} there, {here!r} here" for key, there, here in changes(a, b)]


def changes(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """Keys in which two configs differ: key, value in the first, value in the second; None where one lacks it."""
    left, right = _flat(a), _flat(b)
    return [(key, left.get(key), right.get(key)) for key in left | right if left.get(key) != right.get(key)]


def _flat(config: Config) -> dict[str, Any]:
    return {name.replace("/", "."): value for name, value in tree.flatten(config.to_dict()).items()}


def _kind(value: Any) -> str:
    """What a value is, in words."""
    return {bool: "True or False", int: "a whole number", float: "a number", tuple: "a list", str: "text"}[type(value)]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
