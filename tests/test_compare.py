"""vitft_jax.compare: the same images, paired, and nothing else."""

import csv
import math

import numpy as np
import pytest
from scipy import stats

from vitft_jax import compare, metrics
from vitft_jax.errors import InputError

CLASSES = ("a", "b", "c")


def write(folder, p, labels, groups, classes=CLASSES, names=None, order=None):
    """A folder with the predictions of a run."""
    folder.mkdir()
    names = names or [f"{i}.png" for i in range(len(p))]
    many = labels.ndim == 2
    heads = [f"{k}:{c}" for k in ("true", "predicted") for c in classes] if many else ["true", "predicted"]
    with (folder / "predictions_test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "group", *heads, *(f"p:{c}" for c in classes)])
        for i in range(len(p)) if order is None else order:
            said = [*labels[i], *(p[i] >= 0.5).astype(int)] if many else [classes[labels[i]], classes[p[i].argmax()]]
            writer.writerow([names[i], groups[i], *said, *p[i]])
    return folder


def models(n=90, per_group=3, seed=0):
    """Probabilities of a model and of a better one, labels and groups."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) // per_group % 3
    groups = (np.arange(n) // per_group).astype(str)
    z = rng.normal(size=(n, 3)) + np.eye(3)[labels]
    better = z + 0.4 * np.eye(3)[labels] + 0.2 * rng.normal(size=z.shape)
    return metrics.probabilities(z, False).round(6), metrics.probabilities(better, False).round(6), labels, groups


def test_every_metric_with_its_paired_difference(tmp_path, capsys):
    p, q, labels, groups = models()
    a = write(tmp_path / "a", p, labels, groups)
    b = write(tmp_path / "b", q, labels, groups, order=np.random.default_rng(1).permutation(90))
    result = compare.compare(a, b)
    assert (result["images"], result["groups"]) == (90, 30)
    old, new = metrics.compute(p, labels, False), metrics.compute(q, labels, False)
    change = metrics.change(p, q, labels, groups, (p.argmax(1), q.argmax(1)), CLASSES, metrics.RESAMPLES)
    assert tuple(result["metrics"]) == metrics.MULTICLASS
    for name, found in result["metrics"].items():
        assert (found["a"], found["b"]) == (old[name], new[name]), name
        assert found["value"] == new[name] - old[name], name
        assert (found["low"], found["high"]) == (change[name]["low"], change[name]["high"]), name
        assert found["share_better"] > 0.5, name  # lower is better too
    assert result["mcnemar"] is None
    compare.main([str(a), str(b)])
    printed = capsys.readouterr().out
    assert f"{result['metrics']['accuracy']['value']:+.3f} (" in printed
    assert "brier (lower is better)" in printed
    assert f"decide alike on {(p.argmax(1) == q.argmax(1)).sum()} of the 90 images" in printed
    assert "No McNemar test" in printed


def test_b_and_a_exchanged_is_the_opposite(tmp_path):
    p, q, labels, groups = models()
    a, b = write(tmp_path / "a", p, labels, groups), write(tmp_path / "b", q, labels, groups)
    there, back = compare.compare(a, b)["metrics"], compare.compare(b, a)["metrics"]
    for name in there:
        assert there[name]["value"] == -back[name]["value"], name
        assert there[name]["share_better"] == pytest.approx(1 - back[name]["share_better"]), name


def test_a_run_and_itself_are_not_the_same_for_certain(tmp_path, capsys):
    """No image of 30 groups tells them apart: as if none of 30 trials had, where up to 0.116 might (Clopper-Pearson)."""
    p, _, labels, groups = models()
    a = write(tmp_path / "a", p, labels, groups)
    result = compare.compare(a, a)
    same, bound = result["metrics"], stats.binomtest(0, 30).proportion_ci(0.95, method="exact").high
    assert result["same"] == 90
    assert all(m["value"] == 0 and m["share_better"] == 0.5 for m in same.values())
    assert [same["accuracy"]["low"], same["accuracy"]["high"]] == pytest.approx([-bound, bound])
    assert [same["auroc"]["low"], same["auroc"]["high"]] == pytest.approx([-bound, bound])
    for name in metrics.CALIBRATED:  # which are no shares of images, so nothing bounds them
        assert math.isnan(same[name]["low"])
        assert same[name]["why"] == "the same in every resample"
    compare.show(a, a, "test", result)
    printed = capsys.readouterr().out
    assert "+0.000 (-0.116 to +0.116)" in printed
    assert "decide alike on 90 of the 90 images" in printed


def test_mcnemar_by_hand(tmp_path):
    """Of ten independent images on which one alone is right, nine are the second's: p = 2 (1 + 10) / 2^10."""
    right_a = np.array([True] * 5 + [True] + [False] * 9 + [False] * 3)
    right_b = np.array([True] * 5 + [False] + [True] * 9 + [False] * 3)
    found = compare.mcnemar(right_a, right_b)
    assert (found["only_a"], found["only_b"]) == (1, 9)
    assert found["p"] == pytest.approx(2 * 11 / 1024)
    assert compare.mcnemar(right_a, right_a)["p"] == 1
    p, q, labels, _ = models()
    a, b = (write(tmp_path / name, x, labels, np.arange(90)) for name, x in (("a", p), ("b", q)))
    found = compare.compare(a, b)["mcnemar"]
    only = [int(((x.argmax(1) == labels) & (y.argmax(1) != labels)).sum()) for x, y in ((p, q), (q, p))]
    assert [found["only_a"], found["only_b"]] == only
    assert found["p"] == pytest.approx(stats.binomtest(only[0], sum(only)).pvalue)


def test_several_labels_and_undefined_metrics(tmp_path, capsys):
    p, q, labels, groups = models()
    truth = np.eye(3, dtype=int)[labels]
    truth[:, 2] = 0
    hostile = ("a", "b", "[c]")  # no markup of the screen's
    a, b = (write(tmp_path / name, x, truth, groups, hostile) for name, x in (("a", p), ("b", q)))
    result = compare.compare(a, b)
    assert tuple(result["metrics"]) == metrics.MULTILABEL
    assert math.isnan(result["metrics"]["auroc"]["value"])
    assert math.isnan(result["metrics"]["auroc"]["share_better"])
    assert result["mcnemar"] is None
    compare.show(a, b, "test", result)
    assert "undefined (no image has '[c]')" in capsys.readouterr().out


def test_runs_that_cannot_be_compared(tmp_path):
    p, q, labels, groups = models()
    a = write(tmp_path / "a", p, labels, groups)
    others = {
        "its classes are x, y, z": {"classes": ("x", "y", "z")},
        "images, such as '0.png', are in the split of one run only": {"names": [f"{i + 1}.png" for i in range(90)]},
        "the label of '0.png' is 1 there and 0 in the other run": {"labels": (labels + 1) % 3},
        "the group of '0.png' is p0 there and 0 in the other run": {"groups": np.char.add("p", groups)},
    }
    for i, (message, changes) in enumerate(others.items()):
        b = write(tmp_path / f"b{i}", **({"p": q, "labels": labels, "groups": groups} | changes))
        with pytest.raises(InputError) as error:
            compare.compare(a, b)
        assert message in str(error.value)
    names = [f"{i}.png" for i in range(90)]
    twice = write(
        tmp_path / "twice", np.r_[q, q[:1]], np.r_[labels, labels[:1]], [*groups, groups[0]], names=[*names, "0.png"]
    )
    for pair in ((a, twice), (twice, a)):
        with pytest.raises(InputError, match=r"twice.*: '0\.png' is in its table of predictions more than once"):
            compare.compare(*pair)
    with pytest.raises(InputError, match="no table of predictions"):
        compare.compare(a, tmp_path / "nowhere")
