"""Checks the images, labels and splits that a config names, before a model is trained on them.

Prints a summary and writes `check.json`, `check.md` and, where there is something to show, `duplicates.png` and `odd.png`.
Exit code 0: nothing stands against training on these data and trusting the result. 4: something does (problems). 2: bad input,
such as a table that cannot be understood; its faults are listed together.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitft_jax import cli, data, report, run, sheets
from vitft_jax.config import Config
from vitft_jax.data import duplicates, sources
from vitft_jax.data.duplicates import Pair
from vitft_jax.data.oddities import Inspected, inspect
from vitft_jax.data.splits import alike_but_for_case
from vitft_jax.report.markdown import plain

PROBLEMS_FOUND = 4  # exit code; 1 is a defect of the program
_THREADS = 4
_LISTED = 50  # items of a finding in check.md
_KEPT = 1000  # items of a finding, and pairs, in check.json
_INPUT = 224  # side of the model's input where the config leaves it to weights that were not read
_NONE = ("na", "n/a", "nan", "none", "null", "unknown", "missing", "-", "?")  # groups that are none


@dataclass(frozen=True)
class Finding:
    """Something found, with every place where it was.

    Attributes:
        kind: Its name.
        problem: Whether it stands against training on these data, or is only worth a look.
        advice: What it means and what to do.
        items: The places.
    """

    kind: str
    problem: bool
    advice: str
    items: tuple[str, ...]


@dataclass(frozen=True)
class Check:
    """What was found in a dataset; `pairs` are the duplicates, those that matter most first."""

    dataset: data.Dataset
    images: tuple[Inspected, ...]
    pairs: tuple[Pair, ...]
    findings: tuple[Finding, ...]

    @property
    def clean(self) -> bool:
        """Whether there are no problems."""
        return not any(finding.problem for finding in self.findings)


def check(config: Config) -> Check:
    """Looks at all images of a config, its labels and its splits.

    Raises:
        InputError: The data, their table or the config cannot be understood.
    """
    settings = config.data.copy_and_resolve_references()
    settings.image_size = 0  # images are seen whole, not reduced as for a model
    dataset, _ = sources.read(settings, config.seed)
    size = config.data.image_size or _side(config)
    with ThreadPoolExecutor(_THREADS) as pool:
        images = tuple(pool.map(lambda i: inspect(dataset.images, i, size), range(len(dataset))))
    readable = [i for i, image in enumerate(images) if image.print is not None]
    found = duplicates.pairs([images[i].print for i in readable])
    pairs = [Pair(readable[p.first], readable[p.second], p.kind, p.similarity) for p in found]
    pairs.sort(key=lambda p: not _crosses(dataset, p) and 1 + (not _conflicts(dataset, p)))
    findings = (*_of_splits(dataset), *_of_pairs(dataset, pairs), *_of_images(dataset, images))
    return Check(dataset, images, tuple(pairs), tuple(f for f in findings if f.items))


def _side(config: Config) -> int:
    """Of the input of the model, as the weights say where they come with the package."""
    return run.resolve(config)[0].data.image_size if config.model.pretrained == "bundled" else _INPUT


def _of_splits(dataset: data.Dataset) -> Iterator[Finding]:
    splits, counts = np.array(dataset.splits), _counts(dataset)
    yield Finding(
        "empty splits",
        True,
        "Each of train, val and test needs images.",
        tuple(split for split in data.SPLITS if split not in dataset.splits),
    )
    yield Finding(
        "images without a group",
        False,
        "Each counts as a group of its own. Where several are of one patient or video they may lie in different splits, and "
        "intervals are too narrow: name it in the column group of a table.",
        tuple(name for name, group in zip(dataset.names, dataset.groups, strict=True) if group == name),
    )
    yield Finding(
        "groups with the name of none",
        False,
        "All images with such a group count as one patient or video: where it is not known, leave it blank.",
        tuple(f"{g}: {n} images" for g, n in Counter(dataset.groups).items() if g.casefold() in _NONE),
    )
    yield Finding(
        "groups that differ in capital letters alone",
        False,
        "They count as different patients or videos, which may lie in different splits: spell those alike that are one.",
        tuple(", ".join(names) for names in alike_but_for_case(dataset.groups)),
    )
    yield Finding(
        "classes that differ in capital letters alone",
        True,
        "Spell them alike.",
        tuple(", ".join(names) for names in alike_but_for_case(dataset.classes)),
    )
    where: dict[str, Counter] = {}
    for group, split in zip(dataset.groups, splits, strict=True):
        where.setdefault(group, Counter())[split] += 1
    yield Finding(
        "groups across splits",
        True,
        "Put a group (patient, video) into one split, or results look better than they are.",
        tuple(f"{g}: {', '.join(f'{n} {s}' for s, n in c.items())}" for g, c in where.items() if len(c) > 1),
    )
    absent = {split: [name for name, n in counts[split].items() if not n] for split in data.SPLITS if split in splits}
    yield Finding(
        "classes without training images",
        True,
        "Add images of more groups, correct the splits, or leave the class out.",
        tuple(absent.get("train", ())),
    )
    yield Finding(
        "classes that a split lacks",
        False,
        "Metrics over all classes are not defined there.",
        tuple(f"{name}: none in {split}" for split in ("val", "test") for name in absent.get(split, ())),
    )


def _of_pairs(dataset: data.Dataset, pairs: Sequence[Pair]) -> Iterator[Finding]:
    crossing = [p for p in pairs if _crosses(dataset, p)]
    conflicting = [p for p in pairs if _conflicts(dataset, p)]
    rest = [p for p in pairs if not _crosses(dataset, p) and not _conflicts(dataset, p)]
    apart = [p for p in rest if dataset.groups[p.first] != dataset.groups[p.second]]
    within = [p for p in rest if dataset.groups[p.first] == dataset.groups[p.second]]
    for kind, problem, advice, chosen in (
        (
            "duplicates across splits",
            True,
            "The model is tested on what it was trained on: give both images one group, and split by group.",
            crossing,
        ),
        ("duplicates with different labels", True, "At least one of the labels is wrong: correct it.", conflicting),
        (
            "duplicates in different groups of a split",
            False,
            "They count as independent, so intervals come out too narrow: give both images one group.",
            apart,
        ),
        (
            "duplicates within a group",
            False,
            "As frames of one video or views of one patient are; nothing to do.",
            within,
        ),
    ):
        yield Finding(kind, problem, advice, tuple(_say(dataset, p) for p in chosen))


def _of_images(dataset: data.Dataset, images: Sequence[Inspected]) -> Iterator[Finding]:
    yield Finding(
        "unreadable images",
        True,
        "Repair these files, or take them out of the data.",
        tuple(image.fault for image in images if image.fault),
    )
    by_kind: dict[str, list[str]] = {}
    for name, image in zip(dataset.names, images, strict=True):
        for kind, details in image.odd:
            by_kind.setdefault(kind, []).append(f"{name}: {details}")
    advice = {
        "constant": "There is nothing on these images: take them out.",
        "mostly black": "See whether something is on them.",
        "tiny": "They have fewer than half of the pixels a side that the model takes.",
        "elongated": "data.fit=squash distorts them; consider crop or pad.",
        "more than 8 bits": "They are scaled to 8 bits by the smallest depth that holds their maximum.",
        "transparent": "They are put on black.",
        "several frames": "Only the first is read.",
        "damaged later frames": "Only the first is read, but who damaged the others may have damaged it too: look at it.",
    }
    for kind, items in sorted(by_kind.items()):
        yield Finding(f"{kind} images", kind == "constant", advice[kind], tuple(items))


def _crosses(dataset: data.Dataset, pair: Pair) -> bool:
    return dataset.splits[pair.first] != dataset.splits[pair.second]


def _conflicts(dataset: data.Dataset, pair: Pair) -> bool:
    """Whether the labels of a pair contradict each other. Labels that come and go in a video do not."""
    if np.array_equal(dataset.labels[pair.first], dataset.labels[pair.second]):
        return False
    in_video = dataset.multilabel and dataset.groups[pair.first] == dataset.groups[pair.second]
    return pair.kind == "exact" or not in_video


def _label(dataset: data.Dataset, index: int) -> str:
    label = dataset.labels[index]
    if not dataset.multilabel:
        return dataset.classes[label]
    return "+".join(name for name, on in zip(dataset.classes, label, strict=True) if on) or "none"


def _place(dataset: data.Dataset, index: int) -> str:
    return f"{dataset.names[index]} ({dataset.splits[index]}, {_label(dataset, index)})"


def _say(dataset: data.Dataset, pair: Pair) -> str:
    how = pair.kind if pair.kind == "exact" else f"{pair.kind} {pair.similarity:.2f}"
    return f"{_place(dataset, pair.first)} = {_place(dataset, pair.second)}: {how}"


def _counts(dataset: data.Dataset) -> dict[str, dict[str, int]]:
    """Images of each class in each split."""
    one_hot = dataset.labels if dataset.multilabel else np.eye(len(dataset.classes))[dataset.labels]
    counts = {split: one_hot[dataset.indices(split)].sum(axis=0) for split in data.SPLITS}
    return {s: {name: int(n) for name, n in zip(dataset.classes, c, strict=True)} for s, c in counts.items()}


def write(found: Check, output: Path) -> None:
    """Writes the report and its pictures into a folder, which is made."""
    output.mkdir(parents=True, exist_ok=True)
    report.write_json(output / "check.json", _json(found))
    pictures = _pictures(found, output)
    report.write_text(output / "check.md", _markdown(found, pictures))


def _json(found: Check) -> dict[str, Any]:
    dataset, counts = found.dataset, _counts(found.dataset)
    readable = [image for image in found.images if not image.fault]
    return {
        "clean": found.clean,
        "images": len(dataset),
        "multilabel": dataset.multilabel,
        "splits": {
            split: {
                "images": len(dataset.indices(split)),
                "groups": len({dataset.groups[i] for i in dataset.indices(split)}),
                "classes": counts[split],
            }
            for split in data.SPLITS
        },
        "sizes": dict(Counter(f"{w} x {h}" for w, h in (image.size for image in readable)).most_common()),
        "modes": dict(Counter(image.mode for image in readable).most_common()),
        "findings": [
            {"kind": f.kind, "problem": f.problem, "count": len(f.items), "advice": f.advice, "items": f.items[:_KEPT]}
            for f in found.findings
        ],
        "pairs": [
            {
                "kind": pair.kind,
                "similarity": round(pair.similarity, 4),
                "names": [dataset.names[i] for i in (pair.first, pair.second)],
                "splits": [dataset.splits[i] for i in (pair.first, pair.second)],
                "labels": [_label(dataset, i) for i in (pair.first, pair.second)],
                "groups": [dataset.groups[i] for i in (pair.first, pair.second)],
            }
            for pair in found.pairs[:_KEPT]
        ],
    }


def _pictures(found: Check, output: Path) -> list[tuple[str, str]]:
    """Draws what there is to see; returns names of files and titles."""
    dataset, drawn = found.dataset, []
    for name in ("duplicates.png", "odd.png"):  # of an earlier check
        (output / name).unlink(missing_ok=True)
    if found.pairs:
        shown = found.pairs[: sheets.MOST // 2]
        title = f"{len(shown)} of {len(found.pairs)} pairs of duplicates, side by side; red: across splits or labels"
        tiles = []
        for number, pair in enumerate(shown, 1):
            bad = _crosses(dataset, pair) or _conflicts(dataset, pair)
            how = pair.kind if pair.kind == "exact" else f"{pair.kind} {pair.similarity:.2f}"
            for i in (pair.first, pair.second):
                caption = f"pair {number}, {how}\n{dataset.names[i]}\n{dataset.splits[i]}, {_label(dataset, i)}"
                tiles.append(sheets.Tile(dataset.images[i], caption, False if bad else None))
        sheets.draw(output / "duplicates.png", tiles, title, columns=6)
        drawn.append(("duplicates.png", title))
    odd = [i for i, image in enumerate(found.images) if image.odd or image.fault]
    if odd:
        shown = [odd[i] for i in sheets.spread(len(odd))]
        title = f"{len(shown)} of {len(odd)} odd images"
        tiles = []
        for i in shown:
            image = found.images[i]
            why = "\n".join(f"{kind}: {details}" for kind, details in image.odd)
            picture = None if image.fault else dataset.images[i]
            tiles.append(sheets.Tile(picture, f"{dataset.names[i]}\n{why}".strip(), False if image.fault else None))
        sheets.draw(output / "odd.png", tiles, title)
        drawn.append(("odd.png", title))
    return drawn


def _markdown(found: Check, pictures: Sequence[tuple[str, str]]) -> str:
    facts = _json(found)
    lines = ["# Data check", "", _verdict(found), ""]
    lines += [f"| split | images | groups | {' | '.join(map(plain, found.dataset.classes))} |"]
    lines += ["|---" + "|---:" * (2 + len(found.dataset.classes)) + "|"]
    for split, of in facts["splits"].items():
        lines.append(f"| {split} | {of['images']} | {of['groups']} | {' | '.join(map(str, of['classes'].values()))} |")
    for name in ("sizes", "modes"):
        most = [f"{key}: {count}" for key, count in list(facts[name].items())[:5]]
        lines += ["", f"{name.capitalize()}: {', '.join(most)}{', ...' if len(facts[name]) > 5 else ''}."]
    for finding in found.findings:
        lines += ["", f"## {'Problem' if finding.problem else 'Note'}: {finding.kind} ({len(finding.items)})"]
        lines += ["", finding.advice, "", *(f"- {plain(item)}" for item in finding.items[:_LISTED])]
        if len(finding.items) > _LISTED:
            lines.append(f"- ... and {len(finding.items) - _LISTED} more")
    for file, title in pictures:
        lines += ["", f"![{title}]({file})"]
    return "\n".join(lines) + "\n"


def _verdict(found: Check) -> str:
    problems = [finding for finding in found.findings if finding.problem]
    count = len(found.dataset)
    return f"{count} images: {', '.join(f'{len(f.items)} {f.kind}' for f in problems) or 'no problems'}"


def _print(found: Check) -> None:
    for split, classes in _counts(found.dataset).items():
        indices = found.dataset.indices(split)
        groups = len({found.dataset.groups[i] for i in indices})
        print(f"{split}: {len(indices)} images, {groups} groups; {', '.join(f'{k} {n}' for k, n in classes.items())}")
    for finding in found.findings:
        print(f"{'problem' if finding.problem else 'note'}: {len(finding.items)} {finding.kind}. {finding.advice}")
        if finding.problem:
            print("\n".join(f"  {item}" for item in finding.items[:3]) + ("\n  ..." if len(finding.items) > 3 else ""))
    print(_verdict(found), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    example = "python -m vitft_jax.check_data --config configs/lora.py --config.data.path=IMAGES --output check"
    arguments = cli.parser(__doc__, example)
    arguments.add_argument("--output", type=Path, help="folder for the report (default: checks/<name of the config>)")
    flags, config = cli.parse_with_config(arguments, argv)
    output = flags.output or Path("checks") / Path(flags.config).stem
    found = check(config)
    write(found, output)
    _print(found)
    print(f"report: {output / 'check.md'}", flush=True)
    if not found.clean:
        sys.exit(PROBLEMS_FOUND)


if __name__ == "__main__":
    cli.main(main)
