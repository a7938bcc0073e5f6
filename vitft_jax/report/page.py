"""`report.html`: a run as one page, a single file that loads nothing, runs no script and is read in light, dark and on paper.

Names of files and classes come from outside; `markup` escapes them, and the page's own policy forbids scripts besides.
"""

from pathlib import Path

from vitft_jax import model_card, processes
from vitft_jax.data import Dataset
from vitft_jax.errors import InputError
from vitft_jax.folder import Folder
from vitft_jax.report import conduct, examples, record, results, words
from vitft_jax.report.files import optional, write_text
from vitft_jax.report.markup import Html, join, outside, table, tag
from vitft_jax.report.record import Record
from vitft_jax.report.style import CSS

FILE = "report.html"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
NOT_A_DEVICE = (
    "Research result. Not a medical device and not validated clinically: nothing here may guide the care of a patient."
)


def after(workdir: Path, dataset: Dataset) -> None:
    """Writes report and model card of a run at the end of a command, which says so where that fails, but has not failed."""
    if not processes.first():
        return
    with optional(str(workdir / FILE), f"python -m vitft_jax.report {workdir} makes it anew"):
        write(workdir, workdir / FILE, dataset)


def write(workdir: Path, output: Path, dataset: Dataset | None = None, images: bool = True) -> None:
    """Writes the page of a run, and into the run's own folder its model card too; of an evaluation of a run, the page alone.

    Args:
        workdir: A run folder.
        output: The page.
        dataset: Of the run; None reads it from where the run had it.
        images: Whether the page has images, figures that show images, names of files, and paths of the machine.

    Raises:
        InputError: There is no run, or one of its files is damaged.
    """
    found = record.read(workdir)
    write_text(output, render(found, dataset, images))
    if found.path == found.run and output.resolve().parent == found.run.resolve():  # elsewhere may be other runs' cards
        model_card.write(output.parent / model_card.FILE, model_card.of(found))


def render(found: Record, dataset: Dataset | None = None, images: bool = True) -> str:
    """The page of a run; arguments as `write`."""
    p = found.predictions.get(found.split)
    if not images:
        found = found.to_pass_on
    sections = {
        "Results": _results(found),
        "Images": _images(found, dataset, images) if p else None,
        "Training": conduct.training(found),
        "Data": conduct.data(found),
        "Method": conduct.method(found),
        "Figures": _figures(found, images),
        "Other settings": _evaluations(found),
        "Cost": conduct.cost(found),
        "Configuration": join(_differs(found), conduct.config(found)),
        "Weights and machine": conduct.origin(found),
    }
    return document(found.name, _head(found), sections)


def document(title: str, head: Html, sections: dict[str, Html | None]) -> str:
    """A page of sections; those that are None are left out."""
    shown = {name: content for name, content in sections.items() if content}
    ids = {name: f"s{i}" for i, name in enumerate(shown)}
    body = join(
        tag("header", head),
        tag("nav", [join(tag("a", name, href=f"#{ids[name]}"), " ") for name in shown], aria_label="sections"),
        tag("main", [tag("section", tag("h2", name, id=ids[name]), content) for name, content in shown.items()]),
        tag("footer", tag("p", NOT_A_DEVICE), tag("p", "Made by vitft_jax from the files of the run.")),
    )
    page = tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name="robots", content="noindex"),
            tag("title", f"{title} - report"),
            tag("link", rel="icon", href="data:,"),
            tag("style", Html(CSS)),
        ),
        tag("body", body),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{page}\n"


def _head(found: Record) -> Html:
    kind = "labels" if found.multilabel else "classes"
    methods = " + ".join(found.config.methods) or "no adapters"
    test = found.counts.get(found.split)
    return join(
        tag("h1", outside(found.name)),
        tag(
            "p",
            f"{len(found.classes)} {kind}: ",
            outside(", ".join(found.classes)),
            f". Methods: {methods}. Base weights: ",
            outside(Path(found.weights["source"]).name),
            f". {test.images:,} {words.SPLITS[found.split]} images in {test.groups:,} groups." if test else None,
            class_="lead",
        ),
        tag("div", tag("p", NOT_A_DEVICE), class_="box"),
        conduct.warnings(found),
    )


def _results(found: Record) -> Html:
    if not found.summary:
        return tag("p", "The run has not finished: there are no results yet.")
    p = found.predictions.get(found.split)
    charts = [tag("figure", tag("h3", "Confusion"), results.confusion(p)), results.curves(found, p)] if p else None
    return join(
        tag("h3", f"{words.SPLITS[found.split].capitalize()} split"),
        results.tiles(found),
        tag("p", results.HOW_TO_READ, class_="note"),
        results.per_class(found),
        tag("div", charts, results.reliability(found, p), class_="charts")
        if p
        else tag("p", "No predictions are recorded."),
        tag("h3", "All metrics"),
        results.all_metrics(found),
        tag(
            "p",
            "Temperature, thresholds and the checkpoint were chosen on the validation split: its numbers flatter. The interval "
            "of the calibration error covers less often than 95 % say: take it as a hint.",
            class_="note",
        ),
    )


def _images(found: Record, dataset: Dataset | None, images: bool) -> Html:
    p = found.predictions[found.split]
    wrong, right = examples.chosen(p)
    if not images:
        return tag("p", "Images and names of files were left out on request.")
    try:
        dataset = dataset or Folder(found.run).dataset(found.config)
    except (InputError, OSError) as error:
        return tag("p", f"Images are not shown, as the data cannot be read here: {error}")
    return join(
        tag(
            "p",
            "This page holds images of the data and names of their files: pass it on only where these may go.",
            class_="note",
        ),
        tag("h3", f"Wrong: the {len(wrong)} surest mistakes") if len(wrong) else tag("p", "There are no mistakes."),
        examples.gallery(p, wrong, dataset) if len(wrong) else None,
        tag("h3", f"Right: {len(right)}, evenly from the surest to the least sure") if len(right) else None,
        examples.gallery(p, right, dataset) if len(right) else None,
    )


def _figures(found: Record, images: bool) -> Html | None:
    if not found.figures:
        return None
    if not images:
        return tag("p", f"{len(found.figures)} figures, which may show images, were left out on request.")
    return join(examples.figure(path) for path in found.figures)


def _differs(found: Record) -> Html | None:
    if not found.differs:
        return None
    return tag("p", "Evaluated under other settings than it was trained with: ", outside("; ".join(found.differs)), ".")


def _evaluations(found: Record) -> Html | None:
    rows = []
    for other in found.evaluations:
        known = other.of("metrics", other.split)
        chosen = list(known)[:4]
        rows.append(
            [
                outside(other.path.name),
                outside("; ".join(other.differs)),
                words.SPLITS[other.split],
                *(results.value(known[name]) for name in chosen),
                conduct.operations(other.summary["flops"]),
                words.speed(other.summary["timing"]["eval_images_per_second"]),
            ]
        )
    if not rows:
        return None
    names = [words.name(name) for name in list(found.evaluations[0].of("metrics", found.evaluations[0].split))[:4]]
    head = ["Name", "differs in", "split", *names, "forward pass", "speed"]
    return table(head, rows, "The same parameters, evaluated under other settings", left=3)
