"""The table of finished runs by scripts/results.py, of run folders made by hand."""

import json

import folders
import pytest
import results
import seeds

from vitft_jax import metrics, report
from vitft_jax.errors import InputError

TRUE = "aabb"  # labels of the four images, each its own patient


def written(root, name, decided, names="wxyz", **metrics):
    """A finished run that decided so; its accuracy is said as given, or as it is."""
    folder = root / name
    folder.mkdir()
    lines = ["path,group,true,predicted,p:a,p:b"]
    for image, true, found in zip(names, TRUE, decided, strict=True):
        p = 0.8 if found == "a" else 0.2
        lines.append(f"{image}.png,{image},{true},{found},{p:.6f},{1 - p:.6f}")
    (folder / "predictions_test.csv").write_text("\n".join(lines) + "\n")
    right = sum(a == b for a, b in zip(decided, TRUE, strict=True)) / 4
    said = {"accuracy": {"value": right, "low": 0.1, "high": 0.9}, **metrics}
    summary = {
        "metrics": {"test": said},
        "best_step": 3,
        "parameters": {"trainable": 1234, "trainable_percent": 0.5},
        "bytes": {"checkpoint": 2_000_000},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def cells(lines):
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if "---" not in line]


def test_a_row_for_the_seeds_of_a_run(tmp_path):
    runs = [
        written(tmp_path, "lora_0", "aabb"),
        written(tmp_path, "lora_1", "abbb"),
        written(tmp_path, "probe", "aaaa"),
    ]
    assert cells(results.table(runs)) == [
        ["run", "seeds", "trainable", "checkpoint", "accuracy"],
        ["lora", "2", "1,234 (0.50 %)", "2.0 MB", "0.875 [0.750 to 1.000]"],
        ["probe", "1", "1,234 (0.50 %)", "2.0 MB", "0.500 (0.100 to 0.900)"],
    ]


def test_the_change_against_other_runs_is_that_of_each_pair(tmp_path):
    """By hand: seed 0 goes from 2 to 3 of 4 right, seed 1 stays at 3: +25 and 0 points, in the mean +12.5."""
    before = [written(tmp_path, "float_0", "abab"), written(tmp_path, "float_1", "abbb")]
    after = [written(tmp_path, "int8_0", "aaab"), written(tmp_path, "int8_1", "aaab")]
    head, same, row = cells(results.table([*before, *after], against=before))
    assert head[-1] == "change of accuracy, points"
    assert same[-1] == ""
    value, _, interval = row[-1].partition(" (")
    low, high = map(float, interval.rstrip(")").split(" to "))
    assert value == "+12.5"
    assert low <= 12.5 <= high
    assert low < high


def test_one_seed_has_the_intervals_of_its_run(tmp_path):
    """Tables of sweeps and of runs agree: also on the calibration error, which is biased, and on means over rare classes."""
    runs = [folders.write(tmp_path / f"run{i}", seed=i) for i in range(2)]
    one, two = (report.read_predictions(path / "predictions_test.csv") for path in runs)
    own = metrics.assess(one.probabilities, one.decided, one.labels, one.groups, one.classes, metrics.RESAMPLES)[
        "metrics"
    ]
    told = seeds.pooled(runs[:1])
    assert told == {name: pytest.approx(value) for name, value in own.items()}
    decided = (one.decided, two.decided)
    change = metrics.change(
        one.probabilities, two.probabilities, one.labels, one.groups, decided, one.classes, metrics.RESAMPLES
    )
    assert seeds.pooled_change(runs[:1], runs[1:]) == {name: pytest.approx(value) for name, value in change.items()}


def test_one_group_has_a_change_without_an_interval(tmp_path):
    runs = [written(tmp_path, "a", "abab"), written(tmp_path, "b", "aaab")]
    for run in runs:
        table = run / "predictions_test.csv"
        table.write_text("\n".join(line.replace(f",{line[0]},", ",p,") for line in table.read_text().splitlines()))
    assert cells(results.table(runs[1:], against=runs[:1]))[1][-1] == "+25.0 (only one group)"


def test_what_cannot_be_compared_is_refused(tmp_path):
    before = [written(tmp_path, f"float_{i}", "abab") for i in (0, 1)]
    after = [written(tmp_path, f"int8_{i}", "aaab") for i in (0, 1)]
    other = written(tmp_path, "other_0", "aaab", names="wxyq")
    with pytest.raises(InputError, match=r"--against: 1 runs to compare the 2 of the row int8 with"):
        results.table(after, against=before[:1])
    with pytest.raises(InputError, match=r"other_0: its test images or their labels are not those of .*float_0"):
        results.table([other], against=before[:1])
    with pytest.raises(InputError, match="2 runs to compare 1 runs with"):
        seeds.pooled_change(before, after[:1])


def test_a_metric_that_is_undefined_says_why(tmp_path):
    nothing = {**dict.fromkeys(("value", "low", "high")), "why": "no image is 'b'"}
    runs = [written(tmp_path, f"lora_{i}", "aabb", auroc=nothing) for i in (0, 1)]
    for chosen in (runs, runs[:1]):
        assert cells(results.table(chosen))[1][-1] == "undefined (no image is 'b')"


def test_a_run_without_a_summary_or_the_split_is_one_message(tmp_path, monkeypatch, capsys):
    run = written(tmp_path, "lora_0", "aabb")
    with pytest.raises(InputError, match=r"lora_0: has no metrics of --split val, only of test"):
        results.main([str(run), "--split", "val"])
    (run / "summary.json").unlink()
    with pytest.raises(InputError, match=r"lora_0: no summary\.json"):
        results.main([str(run)])
    with pytest.raises(InputError, match=r"nowhere: no summary\.json"):
        results.main([str(tmp_path / "nowhere")])
