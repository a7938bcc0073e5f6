"""What tests of exports and adapters share: runs that were never trained, on bases in the files of transformers."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from support import init, randomised, tiny

from vitft_jax import config as configs
from vitft_jax import decision, exported, hf_names, report, run, step, tree
from vitft_jax.build import ARCHITECTURE, build
from vitft_jax.checkpoint import Checkpoints
from vitft_jax.decision import Decision
from vitft_jax.export import hugging_face
from vitft_jax.folder import Folder
from vitft_jax.step import State

FAMILIES = {
    "vit": {"eps": 1e-12},
    "deit": {"distilled": True, "eps": 1e-12},
    "dinov2": {"layer_scale": True, "features": "cls+mean"},
}


def about(**changes):
    values = {
        "format": "hf", "classes": ("a", "b", "c"), "multilabel": False, "image_size": 16, "mean": (0.4, 0.5, 0.6),
        "std": (0.2, 0.3, 0.4), "fit": "squash", "temperature": 1.0, "thresholds": (), "step": 7, "left_out": (),
        "base": {},
    }  # fmt: skip
    return exported.About(**{**values, **changes})


def write_base(folder, family, **changes):
    """A random tiny model in the files of transformers, as the base of runs; its head has other classes."""
    model = tiny(**{**FAMILIES[family], **changes})
    arguments = {name: getattr(model, name) for name in ARCHITECTURE}
    params = {name: np.asarray(leaf) for name, leaf in tree.flatten(init(model)["params"]).items()}
    folder.mkdir(parents=True)
    save_file(
        hugging_face.tensors(params, arguments, hf_names.family_of(arguments)),
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    told = about(classes=("x", "y", "z"))
    report.write_json(folder / "config.json", hugging_face.config(arguments, hf_names.family_of(arguments), told))
    hugging_face.write_processor(folder, told)
    return folder


def config_for(images, base, method=(), **changes):
    """The config of a run with methods."""
    config = configs.default()
    config.methods = (method,) if isinstance(method, str) else method
    config.model.pretrained = str(base)
    config.data.path, config.data.image_size = str(images), 16
    config.data.val_fraction = config.data.test_fraction = 0.2
    config.train.batch_size = 4
    config.adalora.update(init_r=4, target_r=2)
    config.update_from_flattened_dict(changes)
    return config


def several_labels(folder, images):
    """A copy of `conftest.image_folder` with a table of two labels an image; the changes to a config that reads it."""
    shutil.copytree(images, folder)
    rows = ["path,deep,bright"]
    for file in sorted(images.rglob("*.png")):
        name = file.relative_to(images).as_posix()
        rows.append(f"{name},{int(not name.startswith('light'))},{int(not name.startswith('dark'))}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return {"data.path": str(folder), "data.table": "labels.csv", "data.labels": ("deep", "bright")}


def hand_made(workdir, config, how=None, change=lambda name, leaf: leaf):
    """A run whose best checkpoint was drawn at random; `change` may edit its leaves."""
    config, source = run.resolve(config)
    folder = Folder(workdir)
    dataset = folder.dataset(config)
    built = build(config, dataset, source)
    trainable = tree.map_named(change, randomised(jax.device_get(built.trainable), seed=1))
    save(folder, config, dataset, built, trainable)
    decision.write(workdir, how or Decision(1.5), dataset.classes)
    return workdir


def save(folder, config, dataset, built, trainable):
    """Makes a run folder whose best checkpoint holds `trainable`."""
    folder.open(config, dataset, built)
    with Checkpoints(folder.checkpoints) as checkpoints:
        checkpoints.save(State(jnp.int32(7), jax.tree.map(jnp.asarray, trainable), {}), {}, [1.0])


def images_and_logits(workdir, count=4):
    """Random images uint8 `(n, S, S, 3)` and what the best model of a run says, before the temperature."""
    best = run.best(workdir)
    size = best.config.data.image_size
    images = np.random.default_rng(3).integers(0, 255, (count, size, size, 3), np.uint8)
    program = best.built.program
    return images, np.asarray(step.eval_step(best.trainable, best.built.frozen, images, program=program))


def normalised(images, mean, std):
    """Images as a model of torch takes them, float64 `(n, 3, S, S)`."""
    return ((images / 255 - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2).copy()
