"""The compiled program with its weights inside: `model.jax`, a StableHLO module as `jax.export` serialises it.

It maps uint8 images `(B, S, S, 3)` to probabilities `(B, C)` in float32, for any B, on cpu, cuda and tpu. Normalisation and
temperature are inside. Jax with flatbuffers runs it, see docs/export.md. Token skipping,
int8 products and the run's compute dtype are kept.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array
from jax import export as jax_export

from vitft_jax import exported, product, step, tree
from vitft_jax.export.source import Options, Source

FILE = "model.jax"
PLATFORMS = ("cpu", "cuda", "tpu")


def write(source: Source, folder: Path, options: Options) -> list[str]:
    """Writes the program."""
    about = source.about("stablehlo")
    size = about.image_size
    images = jax.ShapeDtypeStruct(jax_export.symbolic_shape(f"batch, {size}, {size}, 3"), jnp.uint8)
    module = jax_export.export(jax.jit(probabilities(source)), platforms=PLATFORMS)(images)
    (folder / FILE).write_bytes(module.serialize())
    exported.write(
        folder,
        about,
        file=FILE,
        platforms=PLATFORMS,
        calling_convention_version=module.calling_convention_version,
        input=f"uint8 (batch, {size}, {size}, 3): RGB, rows from the top, 0 to 255; any batch",
        output=f"float32 (batch, {len(about.classes)}): probabilities",
        jax_version=jax.__version__,
    )
    return source.notes(source.best.config.dtype)


def probabilities(source: Source) -> Callable[[Array], Array]:
    """The function that is exported."""
    best = source.best
    program = best.built.program
    if "quant" in best.config.methods and "quant" not in source.without:
        # Adapters beside integer kernels stay beside them.
        model, variables = program.model, tree.join(best.trainable, best.built.frozen)
    else:
        model, variables = source.model, {"params": best.built.merged(best.trainable)}
    model = model.clone(select=None if "skip" in source.without else program.model.select)
    variables = jax.device_get(variables)
    read = jax.nn.sigmoid if program.multilabel else jax.nn.softmax

    def function(images: Array) -> Array:
        with product.portable():
            logits = model.apply(variables, step.normalise(program, images))
        return read(logits / source.decision.temperature)

    return function
