"""Intervals as runs report them hold the truth as often as they say, by scripts/interval_coverage.py."""

import sys

import interval_coverage as coverage
import pytest

NAMED = ("accuracy", "balanced_accuracy", "f1_macro", "auroc", "average_precision", "brier", "loss")
OF_A_CLASS = ("sensitivity of a", "specificity of a")


@pytest.mark.slow
@pytest.mark.parametrize("groups", [30, 60])
def test_95_percent_intervals_hold_the_truth_in_93_to_97_percent(groups):
    """1,100 sets: of a coverage of 95 %, three standard errors are 2 points. Both values and paired differences."""
    found = coverage.covered("classes", groups, range(1100))
    for kind, names in (("value", (*NAMED, *OF_A_CLASS)), ("difference", NAMED)):
        for name in names:
            assert found[kind, name, "sets"] == 1100
            assert 0.93 <= found[kind, name, "held"] / 1100 <= 0.97, (kind, name)


def test_the_table(capsys, monkeypatch):
    monkeypatch.setattr(coverage, "_POPULATION", 2000)
    monkeypatch.setattr(sys, "argv", ["interval_coverage.py", "--sets", "3", "--groups", "8", "--tasks", "labels"])
    coverage.truth.cache_clear()
    coverage.main()
    coverage.truth.cache_clear()
    lines = capsys.readouterr().out.splitlines()
    assert "| | 8 groups | difference |" in lines
    row = next(line for line in lines if line.startswith("| subset_accuracy |"))
    assert row.count("\u00b1") == 2
    assert next(line for line in lines if line.startswith("| precision of a |")).endswith("|  |")  # of values alone
