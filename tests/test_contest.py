"""Timing side by side, by scripts/contest.py."""

import argparse
import sys
from pathlib import Path

import contest
import pytest

SCRIPT = """
import sys, time
import contest

log, name, *works = sys.argv[1:]
if name == "kept":
    contest.imported()
compiled = []

def write(text):
    with open(log, "a") as file:
        file.write(f"{name} {text}\\n")

def work(which):
    write(f"{which} begins")
    if not compiled:
        compiled.append(len(b"x" * 2**28))
    print("what a work prints is no answer")
    time.sleep(0.01)
    write(f"{which} ends")

facts = {"megabytes": 1.5} if name == "kept" else None
works = {w: lambda w=w: work(w) for w in works}
contest.serve(works, steps=3, tidy=lambda: write("tidies"), lean=name == "lean", facts=facts)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts a contestant by name and works; `start.log` holds what all of them did."""
    monkeypatch.setenv("PYTHONPATH", str(Path(contest.__file__).parent))
    (tmp_path / "contestant.py").write_text(SCRIPT)

    def start(name, *works):
        return contest.Contestant(name, [str(tmp_path / "contestant.py"), str(tmp_path / "log"), name, *works])

    start.log = tmp_path / "log"
    return start


def test_quartiles_stay_within_the_rounds():
    assert contest.quartiles([5.0]) == (5, 5, 5)
    assert contest.quartiles([20.0, 10.0]) == (10, 15, 20)
    assert contest.quartiles([5.0, 1.0, 4.0, 2.0, 3.0]) == (1.5, 3, 4.5)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "many"])
def test_a_number_of_rounds_is_at_least_one(text):
    assert contest.count("3") == 3
    with pytest.raises(argparse.ArgumentTypeError, match="a whole number of at least 1"):
        contest.count(text)


def test_contestants_take_turns_and_never_work_at_once(start):
    contestants = [start("lean", "one", "two"), start("kept", "two")]
    warm = start.log.read_text().splitlines()
    contest.race(contestants, rounds=2)
    assert [{w: len(s) for w, s in c.seconds.items()} for c in contestants] == [{"one": 2, "two": 2}, {"two": 2}]
    for c in contestants:
        assert all(0.01 <= s < c.start_up for seconds in c.seconds.values() for s in seconds)
        assert c.peak_mib > 1
        if sys.platform == "linux":
            assert c.start_mib > c.peak_mib + 200  # the first call took 256 MiB, and gave them back

    lines = start.log.read_text().splitlines()
    works = [line for line in lines if not line.endswith("tidies")]
    for first, second in zip(works[::2], works[1::2], strict=True):
        assert (first.removesuffix("begins"), first[-6:]) == (second.removesuffix("ends"), "begins")
    assert warm.count("kept two begins") == warm.count("lean one begins") == 1 + contest.WARM_UP

    begun = [line.removesuffix(" begins") for line in lines[len(warm) :] if line.endswith("begins")]
    assert begun == (["lean one"] * 4 + ["lean two"] * 4 + ["kept two"] * 3) * 2  # the first of a lean one is not timed
    assert lines[len(warm) :].count("lean tidies") == 4
    assert lines[len(warm) :].count("kept tidies") == 0


def test_start_up_is_told_in_parts_and_facts_are_handed_on(start):
    lean, kept = start("lean", "one"), start("kept", "one")
    contest.race([lean, kept], rounds=1)
    assert (lean.imported, lean.facts) == (None, {})
    assert 0 < kept.imported < kept.start_up
    assert kept.facts == {"megabytes": 1.5}


def test_environment_of_a_contestant(tmp_path, monkeypatch):
    monkeypatch.setenv("ONE", "kept")
    script = tmp_path / "contestant.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(Path(contest.__file__).parent)!r})
import contest
contest.serve(dict.fromkeys([os.environ["ONE"], os.environ["TWO"]], lambda: None), steps=1)
""")
    contestant = contest.Contestant("any", [str(script)], {"TWO": "changed"})
    contest.race([contestant], rounds=1)
    assert contestant.works == ["kept", "changed"]


def test_one_that_fails_ends_the_race(start):
    contestant = start("kept", "one")
    contestant.works = ["one", "unknown"]
    contestant.seconds["unknown"] = []
    with pytest.raises(SystemExit, match="kept ended early"):
        contest.race([contestant], rounds=1)


def test_spread_is_the_median_with_quartiles():
    assert contest.spread([1, 2, 3, 4, 5], "x", digits=1) == "3.0x (1.5 to 4.5)"
    assert contest.spread(iter([2.0])) == "2.00 (2.00 to 2.00)"
