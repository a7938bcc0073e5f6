"""Compares two ways to choose alpha of the smoothing: by the linear layers' own outputs, as quantize does, or by the block's.

python scripts/compare_smoothing.py

Both choose on the same training images of the bundled weights' target set, one fold after another; the other way takes the
alpha with the least squared error of the block's output (the residual stream) when the layers of that block alone are
quantised. Printed is the error of the features of test images with all layers quantised, relative to the features' spread
over the images, once as the weights are and once with outliers planted in every LayerNorm, in float the same function.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vitft_jax import config as configs
from vitft_jax import data, quantizer, run, runtime, tree
from vitft_jax.build import build
from vitft_jax.data.images import resize
from vitft_jax.methods import quant
from vitft_jax.ptq import observe, recipe, simulate, smooth
from vitft_jax.step import Program, normalise

FACTORS = (100.0, 60.0, 30.0)


def planted(params: tree.Tree, factors: Sequence[float] = FACTORS) -> tree.Tree:
    """Outliers by `factors` in as many channels of every LayerNorm of the blocks; the kernels behind take them back."""
    leaves, rng = tree.flatten(params), np.random.default_rng(0)
    for fold in smooth.folds(params):
        if "norm" in fold.source:
            s = np.ones(leaves[f"{fold.source}/scale"].shape, np.float32)
            s[rng.choice(len(s), len(factors), replace=False)] = 1 / np.array(factors)
            leaves = tree.flatten(smooth.apply(tree.unflatten(leaves), fold, jnp.asarray(s)))
    return tree.unflatten(leaves)


def by_block(program: Program, params: tree.Tree, seen: dict, images: Array, settings: quant.Settings) -> tree.Tree:
    """Smooths every fold by the alpha, or none, whose block output is closest to the float one."""
    paths = {path for path in seen if settings.converts(path)}
    simulated = simulate.program(program, dict.fromkeys(paths), settings).model

    @jax.jit
    def output(variables: tree.Tree) -> dict[str, Array]:
        blocks = lambda module, _: (module.name or "").startswith("blocks_")  # noqa: E731
        state = simulated.apply(variables, images, capture_intermediates=blocks, mutable=["intermediates"])[1]
        return {name: value["__call__"][0][0] for name, value in state["intermediates"].items()}

    def layer(leaves: dict[str, Array], path: str) -> simulate.Layer:
        bound = jnp.max(seen[path].absmax) if settings.static else None
        return simulate.Layer(quantizer.quantise_kernel(leaves[f"{path}/kernel"]), leaves[f"{path}/bias"], bound)

    def outputs(params: tree.Tree, block: str) -> Array:
        layers = {path: layer(tree.flatten(params), path) for path in paths}
        in_float = [path for path in paths if not path.startswith(f"{block}/")]
        return output(simulate.variables(params, layers, in_float, False))[block]

    exact = output(simulate.variables(params, {p: layer(tree.flatten(params), p) for p in paths}, paths, False))
    for fold in smooth.folds(params):
        block, leaves = fold.source.split("/")[0], tree.flatten(params)
        weights = jnp.max(jnp.stack([jnp.abs(leaves[f"{p}/kernel"]).max(1) for p in fold.layers]), axis=0)
        activations = seen[fold.layers[0]].absmax
        tries = []
        for s in (jnp.ones_like(weights), *(smooth.factors(activations, weights, a) for a in smooth.ALPHAS)):
            before = {path: seen[path] for path in fold.layers}
            seen.update({path: observe.Seen(x.absmax / s, x.rows / s) for path, x in before.items()})
            after = smooth.apply(params, fold, s)
            tries.append((float(jnp.sum((outputs(after, block) - exact[block]) ** 2)), after, s))
            seen.update(before)
        _, params, s = min(tries, key=lambda t: t[0])
        seen.update({p: observe.Seen(seen[p].absmax / s, seen[p].rows / s) for p in fold.layers})
    return params


def error(
    program: Program, params: tree.Tree, exact: Array, calibrate: Array, test: Array, how: recipe.Recipe
) -> float:
    """Relative error of the features when the rest of a recipe is applied."""
    settings = quant.Settings(static=bool(how.static))
    seen = observe.observe(program.model, params, [calibrate], len(calibrate))
    params, layers, _ = recipe.run(params, seen, settings, how)
    model = simulate.program(program, layers, settings).model
    ours = jax.jit(model.apply)(simulate.variables(params, layers, (), False), test)
    return float(jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact - exact.mean(0)))


def main() -> None:
    """Command line."""
    runtime.start()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=32, help="of each of both splits (default: %(default)s)")
    count = parser.parse_args().images
    config, source = run.resolve(configs.default())
    dataset = data.load(config.data, config.seed)
    built = build(config, dataset, source)
    program = replace(built.program, model=built.program.model.clone(classes=0))
    params = tree.join(built.trainable, built.frozen)["params"]

    def images(split: str) -> Array:
        chosen = np.random.default_rng(0).permutation(dataset.indices(split))[:count]
        pixels = [resize(dataset.images[i], config.data.image_size, config.data.fit) for i in chosen]
        return normalise(program, jnp.asarray(np.stack(pixels)))

    calibrate, test = images("train"), images("test")
    exact = jax.jit(program.model.apply)({"params": params}, test)
    print(f"relative error of the features, {count} images\n{'weights':10}{'ranges':10}  none   by layer  by block")
    change: tuple[tuple[str, Callable[[tree.Tree], tree.Tree]], ...] = (("as is", lambda p: p), ("outliers", planted))
    for name, plant in change:
        for static in ("", "max"):
            start, settings = plant(params), quant.Settings(static=bool(static))
            seen = observe.observe(program.model, start, [calibrate], count)
            smoothed = {
                "none": start,
                "by layer": smooth.search(start, seen, settings, static)[0],
                "by block": by_block(program, start, dict(seen), calibrate, settings),
            }
            how = recipe.Recipe(smooth=False, static=static)
            errors = [error(program, p, exact, calibrate, test, how) for p in smoothed.values()]
            print(f"{name:10}{static or 'dynamic':10}" + "".join(f"{e:8.4f}  " for e in errors), flush=True)


if __name__ == "__main__":
    main()
