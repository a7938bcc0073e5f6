"""Compares quantisers of attention probabilities: their error, and what they do to the features of the model.

python scripts/compare_softmax.py

Takes test images of the bundled weights' target set. Rows are the signed int8 with a scale for each row, which int8 attention
takes, and the quantisers of `vitft_jax.ptq.softmax`. Printed is the error of the probabilities relative to their norm, the
error of those below 1/64 relative to theirs, and the error of the features, relative to their spread over the images, when
the probabilities of all blocks are quantised so and all else is in float.
"""

import argparse
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vitft_jax import config as configs
from vitft_jax import data, quantizer, run, runtime, tree
from vitft_jax.attention import masked_softmax
from vitft_jax.build import build
from vitft_jax.data.images import resize
from vitft_jax.ptq import softmax
from vitft_jax.step import normalise

SMALL = 1 / 64


def per_row(p: Array, bits: int) -> Array:
    """What int8 attention takes: signed integers, one scale for each row."""
    scale = quantizer.scale_of(quantizer.absmax(p, -1), bits)
    return quantizer.round_to(p, scale, bits) * scale


QUANTISERS: dict[str, Callable[[Array, int], Array]] = {
    "per row, as int8 attention": per_row,
    "twin uniform": softmax.twin,
    "log2": softmax.log2,
    "log sqrt 2": softmax.log_sqrt2,
}


def attend(
    change: Callable[[Array], Array], seen: list[Array], q: Array, k: Array, v: Array, keys: Array | None
) -> Array:
    """`attention.attend` with changed probabilities; those in float go into `seen`."""
    scores = jnp.einsum("bhnd,bhmd->bhnm", q * q.shape[-1] ** -0.5, k)
    p = masked_softmax(scores, keys)
    seen.append(p)
    return jnp.einsum("bhnm,bhmd->bhnd", change(p), v)


def main() -> None:
    """Command line."""
    runtime.start()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="of the test split (default: %(default)s)")
    count = parser.parse_args().images
    config, source = run.resolve(configs.default())
    dataset = data.load(config.data, config.seed)
    built = build(config, dataset, source)
    params = tree.join(built.trainable, built.frozen)["params"]
    chosen = np.random.default_rng(0).permutation(dataset.indices("test"))[:count]
    pixels = [resize(dataset.images[i], config.data.image_size, config.data.fit) for i in chosen]
    images = normalise(built.program, jnp.asarray(np.stack(pixels)))

    def features(change: Callable[[Array], Array]) -> tuple[Array, list[Array]]:
        @jax.jit
        def of(params: tree.Tree) -> tuple[Array, list[Array]]:
            seen: list[Array] = []
            model = built.program.model.clone(classes=0, attend=partial(attend, change, seen))
            return model.apply({"params": params}, images), seen

        return of(params)

    exact, seen = features(lambda p: p)
    p = np.concatenate([np.asarray(block, np.float64).ravel() for block in seen])
    spread = jnp.linalg.norm(exact - exact.mean(0))
    print(f"{count} images; {100 * np.mean(p < SMALL):.0f} % of the probabilities are below 1/{1 / SMALL:.0f}")
    print("| bits | quantiser | error of p, % | of p below 1/64, % | error of the features, % |\n|---|---|---|---|---|")
    for bits in (8, 4):
        for name, quantiser in QUANTISERS.items():
            change = partial(quantiser, bits=bits)
            errors = np.concatenate([np.asarray(change(block) - block, np.float64).ravel() for block in seen])
            parts = [np.linalg.norm(errors[m]) / np.linalg.norm(p[m]) for m in (np.full(p.shape, True), p < SMALL)]
            parts.append(float(jnp.linalg.norm(features(change)[0] - exact) / spread))
            print(f"| {bits} | {name} | {' | '.join(f'{100 * e:.2f}' for e in parts)} |", flush=True)


if __name__ == "__main__":
    main()
