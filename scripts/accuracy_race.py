r"""Trains the same model on the same batches by ours and by torch, and compares accuracy, time and memory.

    python scripts/accuracy_race.py --output runs/race
    python scripts/accuracy_race.py --output runs/race_busi --methods lora,adalora,full --seeds 0,1,2 \
        --config.data.path=BUSI --config.data.table=labels.csv --config.model.pretrained=WEIGHTS --config.data.image_size=224

Ours is `vitft_jax.train` on configs/METHOD.py. The peer is transformers with PEFT (full fine-tuning: transformers alone) in a
plain loop of torch: it starts from the same weights and head, which we hand to it as a Hugging Face folder, and gets the same
batches, seed by seed, from our input pipeline. AdamW, what decays, clipping, the rate of each step, the number of steps, the
choice of the epoch by `train.best_metric` on validation, temperature and thresholds are the same too. What differs is what each
library draws for fresh adapters, and arithmetic. A key that the peer does not follow is refused.

Each run is a process. Its folder gets predictions_test.csv and race.json: its config; seconds per step, input included and the
first step left out; and the peak memory of the process, evaluation included. The peer's holds JAX and our copy of the model
too, for the input pipeline, the start and the metrics: what torch alone needs is in docs/benchmarks.md. A run that is there is
not repeated, and refused under another config. The table gives means over the seeds with their range, and paired differences
with 95 % bootstrap intervals (seeds.pooled_change); with --publish FOLDER it also goes to NAME.md there, NAME being that of
--output. Needs the extra `interop`.
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import contest
import numpy as np
import seeds
from safetensors.numpy import save_file

from vitft_jax import cli, data, evaluate, hf_names, metrics, optim, report, run, runtime, train, tree
from vitft_jax import config as configs
from vitft_jax.build import ARCHITECTURE, Built, build
from vitft_jax.errors import InputError
from vitft_jax.export import hugging_face
from vitft_jax.exported import About

METHODS = ("lora", "adalora", "full")
SIDES = ("ours", "peer")
MODULES = {"qv": ["q_proj", "v_proj"], "qkv": ["q_proj", "k_proj", "v_proj"]}  # of PEFT, by our targets
CONFIGS = Path(__file__).parent.parent / "configs"
FOLLOWED = (
    "seed", "dtype", "data.", "augment.", "model.pretrained", "model.revision", "model.name", "train.epochs", "train.steps",
    "train.batch_size", "train.lr", "train.warmup", "train.weight_decay", "train.clip", "train.best_metric", "lora.rank",
    "lora.alpha", "lora.dropout", "lora.targets", "adalora.", "figures.", "log.",
)  # fmt: skip
"""Beginnings of the keys that the peer follows."""
NOT_FOLLOWED = (
    "data.labels",
    "data.workers",
    "augment.mixup",
    "augment.cutmix",
    "lora.rank_pattern",
    "adalora.importance_at",
)
"""Keys among them that it does not."""


def ours(config: configs.Config, folder: Path) -> float:
    """Trains by ours; returns seconds per step."""
    summary = train.train(config, folder)
    return config.train.batch_size / summary["timing"]["train_images_per_second"]


def peer(config: configs.Config, folder: Path) -> float:
    """Trains by torch; writes predictions_test.csv into the folder and returns seconds per step.

    Raises:
        InputError: As `check`.
    """
    import torch

    check(config)
    torch.manual_seed(config.seed)
    config, source = run.resolve(config)
    dataset = data.load(config.data, config.seed)
    built = build(config, dataset, source)
    model, mean, std = _network(config, dataset, built, folder), built.program.mean, built.program.std
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [p for name, p in trained.items() if name.endswith("weight") and p.ndim > 1 and "lora_" not in name]
    rest = [p for p in trained.values() if not any(p is d for d in decayed)]
    groups = [{"params": decayed, "weight_decay": config.train.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, fused=True)  # as transformers' own trainer has it by default
    rate = optim.schedule(config, built.total_steps)
    rates = [float(rate(step)) for step in range(built.total_steps)]
    cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.dtype == "bfloat16")

    def normalised(images: np.ndarray) -> Any:
        x = (images.astype(np.float32) / 255 - np.float32(mean)) / np.float32(std)
        return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))

    def outputs(split: str) -> evaluate.Outputs:
        index, logits = dataset.indices(split), []
        model.eval()
        with torch.inference_mode(), cast:
            for batch in data.eval_batches(dataset, split, **_reading(config)):
                logits.append(model(normalised(batch["image"])).logits.float().numpy())
        model.train()
        return evaluate.Outputs(index, np.concatenate(logits)[: len(index)], dataset.labels[index], math.nan)

    batches = data.train_batches(dataset, **_reading(config), augment=config.augment, seed=config.seed)
    per_epoch = data.steps_per_epoch(dataset, config.train.batch_size)
    ready = built.program.method.ready_from(built.total_steps)
    best, kept, seconds, timed = None, {}, 0.0, 0
    model.train()
    for done in range(1, built.total_steps + 1):
        started = time.perf_counter()
        batch = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = rates[done - 1]
        optimizer.zero_grad(set_to_none=True)
        with cast:
            images, labels = normalised(batch["image"]), torch.from_numpy(batch["label"]).long()
            if "adalora" in config.methods:  # past the outer model, which has no penalty for images
                loss = model.base_model(pixel_values=images, labels=labels).loss
            else:
                loss = torch.nn.functional.cross_entropy(model(pixel_values=images).logits.float(), labels)
        loss.backward()
        if config.train.clip:
            torch.nn.utils.clip_grad_norm_(trained.values(), config.train.clip)
        optimizer.step()
        if "adalora" in config.methods:
            model.base_model.update_and_allocate(done)
        if done > 1:
            seconds, timed = seconds + time.perf_counter() - started, timed + 1
        if done % per_epoch == 0 or done == built.total_steps:
            values, name = outputs("val").metrics, config.train.best_metric
            rank = [done >= ready, metrics.rank(name, values[name]), -values["loss"]]
            if best is None or rank > best:
                best, kept = rank, {name: p.detach().clone() for name, p in trained.items()}
    batches.close()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(kept[name])
    decision = evaluate.fit_decision(folder, dataset, outputs("val"), config)
    evaluate.evaluate_split(folder, dataset, "test", replace(outputs("test"), decision=decision))
    return seconds / max(timed, 1)


def check(config: configs.Config) -> None:
    """Raises InputError if the config has what the peer does not do, and would not say so."""
    method = config.methods[0] if config.methods else "full"
    if len(config.methods) > 1 or method not in METHODS:
        raise InputError(f"config key methods={config.methods}: the peer knows one of {', '.join(METHODS)}")
    for key, _, value in configs.changes(configs.load(str(CONFIGS / f"{method}.py")), config):
        if not key.startswith(FOLLOWED) or key in NOT_FOLLOWED:
            raise InputError(
                f"config key {key}={value!r}: the peer does not follow it; leave it as in configs/{method}.py"
            )
    if config.methods and config[method].targets not in MODULES:
        raise InputError(f"config key {method}.targets={config[method].targets!r}: of the peer, {' or '.join(MODULES)}")


def _reading(config: configs.Config) -> dict[str, Any]:
    return {"batch_size": config.train.batch_size, "image_size": config.data.image_size, "fit": config.data.fit}


def _network(config: configs.Config, dataset: data.Dataset, built: Built, folder: Path) -> Any:
    """The model of transformers that stands where ours stands before step 0, with PEFT's adapters."""
    import peft
    import transformers

    model = {key: getattr(built.program.model, key) for key in ARCHITECTURE}
    params = {n: np.asarray(p) for n, p in tree.flatten(tree.join(built.trainable, built.frozen)["params"]).items()}
    start, size = folder / "start", config.data.image_size
    start.mkdir(exist_ok=True)
    family = hf_names.family_of(model)
    about = About("hf", dataset.classes, False, size, (), (), config.data.fit, 1.0, (), 0, (), {})
    save_file(hugging_face.tensors(params, model, family), start / "model.safetensors", {"format": "pt"})
    report.write_json(start / "config.json", hugging_face.config(model, family, about))
    network = transformers.AutoModelForImageClassification.from_pretrained(start)
    if not config.methods:
        return network
    group = config[config.methods[0]]
    common = {"target_modules": MODULES[group.targets], "modules_to_save": ["classifier"], "lora_alpha": group.alpha}
    if config.methods[0] == "lora":
        return peft.get_peft_model(network, peft.LoraConfig(r=group.rank, lora_dropout=group.dropout, **common))
    steps = built.total_steps
    schedule = {"tinit": round(group.t_init * steps), "tfinal": round(group.t_final * steps), "deltaT": group.delta_t}
    ranks = {"init_r": group.init_r, "target_r": group.target_r, "orth_reg_weight": group.penalty}
    return peft.get_peft_model(network, peft.AdaLoraConfig(**ranks, **schedule, total_step=steps, **common))


def one(side: str, config: configs.Config, folder: Path) -> None:
    """A run of one side."""
    folder.mkdir(parents=True, exist_ok=True)
    seconds = (ours if side == "ours" else peer)(config, folder)
    told = {"config": made(config), "seconds_per_step": seconds, "peak_mib": contest.peak_mib()}
    report.write_json(folder / "race.json", told)


def made(config: configs.Config) -> dict[str, Any]:
    """What a run was made with, as race.json has it."""
    return json.loads(configs.to_json(configs.absolute(config)))


def done(folder: Path, config: configs.Config) -> bool:
    """Whether the run of a folder is done.

    Raises:
        InputError: It was made with another config.
    """
    if not (folder / "race.json").exists():
        return False
    if json.loads((folder / "race.json").read_text(encoding="utf-8")).get("config") != made(config):
        raise InputError(f"{folder}: was made with other settings; choose another --output, or delete this run")
    return True


def table(output: Path, method: str, numbers: Sequence[int]) -> list[str]:
    """Rows of a method: ours, the peer, and the difference."""
    folders = {side: [output / f"{method}_{side}_{seed}" for seed in numbers] for side in SIDES}
    told = {s: [json.loads((f / "race.json").read_text(encoding="utf-8")) for f in folders[s]] for s in SIDES}
    rows = []
    for side in SIDES:
        values = [seeds.pooled([folder]) for folder in folders[side]]
        cells = [_range([v[name]["value"] for v in values], 3) for name in ("accuracy", "auroc")]
        cells += [
            _range([1e3 * t["seconds_per_step"] for t in told[side]], 0),
            _range([t["peak_mib"] for t in told[side]], 0),
        ]
        rows.append([method, side, *cells])
    change = seeds.pooled_change(folders["peer"], folders["ours"])
    paired = [
        f"{change[name]['value']:+.3f} ({change[name]['low']:+.3f} to {change[name]['high']:+.3f})"
        for name in ("accuracy", "auroc")
    ]
    ratios = [b["seconds_per_step"] / a["seconds_per_step"] for a, b in zip(told["ours"], told["peer"], strict=True)]
    rows.append([method, "ours against the peer", *paired, f"{_range(ratios, 2)} times the speed", ""])
    return [f"| {' | '.join(row)} |" for row in rows]


def _config(method: str, seed: int, overrides: Sequence[str]) -> configs.Config:
    return configs.load(str(CONFIGS / f"{method}.py"), [*overrides, f"seed={seed}"])


def _range(values: Sequence[float], digits: int) -> str:
    """Mean with the range."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} [{min(values):.{digits}f} to {max(values):.{digits}f}]" if len(values) > 1 else mean


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = cli.parser(__doc__, "python scripts/accuracy_race.py --output runs/race --seeds 0,1,2")
    arguments.add_argument("--output", required=True, type=Path, help="folder of the runs")
    arguments.add_argument("--methods", default="lora", help=f"of {', '.join(METHODS)}")
    arguments.add_argument("--seeds", default="0,1,2")
    arguments.add_argument("--publish", type=Path, metavar="FOLDER", help="write the table there too")
    arguments.add_argument("--one", help=argparse.SUPPRESS)
    options, overrides = cli.parse_with_overrides(arguments, argv, "--config.train.epochs=2")
    chosen = options.methods.split(",")
    if unknown := set(chosen) - set(METHODS):
        raise InputError(f"--methods {min(unknown)}: of {', '.join(METHODS)}")
    if not all(seed.isdigit() for seed in options.seeds.split(",")):
        raise InputError(f"--seeds {options.seeds}: numbers, such as 0,1,2")
    numbers = [int(seed) for seed in options.seeds.split(",")]
    if options.one:
        config = _config(chosen[0], numbers[0], overrides)
        if options.one == "ours":
            runtime.start()
        one(options.one, config, options.output / f"{chosen[0]}_{options.one}_{numbers[0]}")
        return
    for method in chosen:
        check(_config(method, 0, overrides))  # what is wrong is said once, and at once
    lines = []
    for method in chosen:
        for seed in numbers:
            for side in SIDES:
                if done(options.output / f"{method}_{side}_{seed}", _config(method, seed, overrides)):
                    continue
                command = [__file__, "--output", str(options.output), "--methods", method, "--seeds", str(seed)]
                command += ["--one", side, *(f"--config.{override}" for override in overrides)]
                print(f"{method}, seed {seed}, {side}", flush=True)
                if code := subprocess.run([sys.executable, *command], check=False).returncode:
                    sys.exit(code)
        lines += table(options.output, method, numbers)
    head = ("method", "", "accuracy", "AUROC", "ms a step", "peak MiB")
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "torch", "transformers", "peft"))
    where = f"{report.cpu()}, Python {platform.python_version()}, {versions}."
    text = "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines, "", where])
    print(text)
    if options.publish:
        options.publish.mkdir(parents=True, exist_ok=True)
        report.write_text(options.publish / f"{options.output.absolute().name}.md", f"{text}\n")


if __name__ == "__main__":
    cli.main(main)
