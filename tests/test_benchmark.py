"""The benchmark: what its contestants do, at 32 px, and its table."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import benchmark
import contestants
import jax
import numpy as np
import profile_step
import pytest
from contestants import Label, ours
from support import TINY, integer_dots

from vitft_jax import step, tree, vit
from vitft_jax.errors import InputError

SHAPE = {**TINY, "patch": 16}
OPTIONS = argparse.Namespace(model="tiny_test", size=32, batch=2, dtype="float32", shape=SHAPE)
MINE = [("forward", "ours"), ("lora", "ours"), ("full", "ours"), ("adalora", "ours"), ("adalora", "lora"), ("int8", "ours"),
        ("int8", "ours_static"), ("int8", "float"), ("int8_lora", "ours"), ("int8_lora", "float"), ("qat", "ours"),
        ("qat", "float"), ("skip_1", "dense"), ("skip_1", "prune"), ("skip_lora", "rejoin")]  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Ten blocks, since token skipping leaves after block 9; else tiny."""
    monkeypatch.setitem(vit.VARIANTS, "tiny_test", {**SHAPE, "depth": 12})


@pytest.fixture
def shallow(monkeypatch):
    monkeypatch.setitem(vit.VARIANTS, "tiny_test", SHAPE)


def compiled(task, name):
    """The compiled step of a contestant of ours, and what trains in it."""
    program, trainable, frozen, batch = ours.prepared(Label(task, name, "float32"), OPTIONS)
    if task in contestants.FORWARD:
        return step.eval_step.lower(trainable, frozen, batch["image"], program=program).compile(), trainable
    state = jax.eval_shape(lambda: step.init_state(program, trainable))
    return step.train_step.lower(state, frozen, batch, program=program).compile(), trainable


@pytest.mark.parametrize(
    ("task", "name"), [pair for pair in MINE if pair[0] in ("forward", "lora", "full", "int8", "int8_lora", "qat")]
)
def test_int8_products_are_where_the_task_says_and_nowhere_else(shallow, task, name):
    program, trainable = compiled(task, name)
    has = bool(integer_dots(program))
    assert has == (task in ("int8", "int8_lora", "qat") and name != "float")
    assert benchmark.dtype_of(Label(task, name, "float32")) == ("int8" if has else "float32")
    whole = task in ("full", "qat")
    assert any("fc1/kernel" in leaf for leaf in tree.flatten(trainable)) == whole
    assert any(leaf.startswith("lora/") for leaf in tree.flatten(trainable)) == task.endswith("lora")


@pytest.mark.slow
@pytest.mark.parametrize(("task", "name"), MINE)
def test_a_contestant_of_ours_steps(task, name):
    built = contestants.build(Label(task, name, "float32"), OPTIONS)
    built.step()
    built.step()
    assert built.facts["megabytes"] >= built.facts["frozen_megabytes"] >= 0


def test_static_ranges_are_there_before_the_images(shallow):
    program, trainable, frozen, batch = ours.prepared(Label("int8", "ours_static", "float32"), OPTIONS)
    bounds = [leaf for name, leaf in tree.flatten(frozen).items() if name.endswith("/bound")]
    assert len(bounds) == 6 * SHAPE["depth"]
    assert all(bound == contestants.RANGE for bound in bounds)
    assert all(
        np.isfinite(out).all()
        for out in jax.tree.leaves(step.eval_step(trainable, frozen, batch["image"], program=program))
    )


def test_a_base_of_integers_has_a_quarter_of_the_bytes(shallow):
    sizes = {}
    for name in ("ours", "float"):
        _, _, frozen, _ = ours.prepared(Label("int8_lora", name, "float32"), OPTIONS)
        sizes[name] = sum(
            leaf.nbytes for path, leaf in tree.flatten(frozen).items() if "blocks" in path and path.endswith("kernel")
        )
    assert sizes["float"] == 4 * sizes["ours"]


PEERS = [("forward", "transformers"), ("forward", "timm"), ("forward", "onnx"), ("int8", "torch"), ("int8", "onnx"),
         ("lora", "peft"), ("adalora", "peft"), ("full", "transformers"), ("skip_8", "evit"), ("export", "float32"),
         ("export", "dynamic"), ("export", "static"), ("linear", "torch"), ("attention", "torch")]  # fmt: skip


@pytest.mark.interop
@pytest.mark.slow
@pytest.mark.parametrize(("task", "name"), PEERS)
def test_a_peer_steps(task, name):
    who = Label(task, name, "float32")
    assert not contestants.lacks(who)
    model = "vit_tiny_patch16"
    built = contestants.build(
        who, argparse.Namespace(**{**vars(OPTIONS), "model": model, "shape": vit.VARIANTS[model]})
    )
    built.step()
    built.step()


@pytest.mark.parametrize("task", ["linear", "matmul", "attention", "gelu"])
def test_our_parts_of_a_layer_are_those_of_jax(shallow, task):
    found = []
    for name in ("ours", "autodiff"):
        built = contestants.build(Label(task, name, "float32"), OPTIONS)
        found.append(jax.tree.leaves(built.step()))
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def alone(*lines):
    """Runs lines in a fresh process that finds our scripts; then jax must not be there."""
    script = "; ".join(["import sys", f"sys.path.insert(0, {str(Path(benchmark.__file__).parent)!r})", *lines])
    subprocess.run([sys.executable, "-c", f"{script}; assert 'jax' not in sys.modules"], check=True, timeout=300)


def test_a_contestant_that_is_a_peer_imports_no_jax():
    """Imports and memory of its process are its own."""
    alone("import benchmark", "from contestants import layers")


@pytest.mark.interop
@pytest.mark.slow
@pytest.mark.parametrize(
    "who", [("forward", "timm"), ("lora", "peft"), ("skip_8", "evit"), ("gelu", "torch"), ("int8", "onnx")]
)
def test_a_peer_imports_no_jax(who):
    shape = vit.VARIANTS["vit_tiny_patch16"]
    options = argparse.Namespace(model="vit_tiny_patch16", size=32, batch=2, dtype="float32", shape=shape)
    alone(
        "import contestants",
        "from argparse import Namespace",
        f"contestants.build(contestants.Label(*{who}, 'float32'), {options})",
    )


def test_labels():
    assert contestants.parse("lora", "ours", "float32") == ("lora", "ours", "float32")
    assert contestants.parse("inference", "int8/torch", "float32") == ("int8", "torch", "float32")
    assert contestants.parse("inference", "forward/ours:bfloat16", "float32") == ("forward", "ours", "bfloat16")
    for task, labels in benchmark.TASKS.items():
        for label in labels:
            who = contestants.parse(task, label, "float32")
            assert who.name in {
                *contestants.PEERS,
                *contestants.GRAPHS,
                *contestants.SKIP,
                "ours",
                contestants.STATIC,
                "float",
                "lora",
                "autodiff",
                "step",
            }


def test_without_the_extra_what_is_missing_is_named_and_left_out(monkeypatch, capsys):
    real = importlib.util.find_spec
    gone = {"torch", "transformers", "peft", "timm", "onnx", "onnxruntime"}
    monkeypatch.setattr(contestants, "find_spec", lambda name: None if name in gone else real(name))
    options = benchmark.arguments_of(["forward", "input"])
    assert benchmark.kept("forward", options) == ["ours"]
    assert benchmark.kept("input", options) == ["ours", "step"]
    said = capsys.readouterr().err
    assert "forward: timm is left out; it needs torch, timm (extra `interop`)" in said
    graph = Label("forward", "onnx", "bfloat16")  # its graph is float32, whatever the others have
    assert contestants.lacks(graph) == "float32, the dtype of its graph"
    assert "float32" not in contestants.lacks(graph._replace(task="int8"))
    assert benchmark.version("a package that nobody has") == "not installed"
    with pytest.raises(InputError, match="no contestant is left in forward"):
        benchmark.main(["forward", "--only", "timm"])


def test_bad_command_lines_are_told(tmp_path):
    for argv, what in (
        (["forwards"], "unknown task 'forwards'; did you mean 'forward'"),
        (["lora", "--variant", "XLA_FLAGS"], "give NAME=VALUE"),
        (["lora", "--json", str(tmp_path / "none" / "x.json")], "no such folder"),
    ):
        with pytest.raises(InputError, match=what):
            benchmark.arguments_of(argv)


class Instead:
    """A contestant in this process, twice as slow as the one before it; the peak is 100 GF/s."""

    started = 0

    def __init__(self, name, command, environment):
        Instead.started += 1
        self.name, self.environment = name, environment
        seconds = 2.0 * benchmark.layers.peak_operations() / 2e11 if "peak" in command else 2.0**Instead.started
        self.seconds, self.works = {"step": [seconds] * 2}, ["step"]
        self.imported, self.start_up, self.start_mib, self.peak_mib, self.facts = (
            1.0,
            2.0,
            30.0,
            20.0,
            {"megabytes": 5.0},
        )


def test_table_and_file(shallow, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "Contestant", Instead)
    monkeypatch.setattr(benchmark, "race", lambda started, rounds: None)
    Instead.started = -2  # the peak has one or two contestants, with and without torch
    path = tmp_path / "found.json"
    argv = ["int8", "--only", "ours,float", "--model", "tiny_test", "--size", "32", "--variant", "A=b"]
    benchmark.main([*argv, "--json", str(path)])
    told = json.loads(path.read_text())
    assert told["command"] == "python scripts/benchmark.py " + " ".join(argv)
    assert told["peak_gflops"] == pytest.approx({"float32": 100.0, "int8": 100.0})
    mine, theirs, variant = told["rows"]
    assert [row["contestant"] for row in told["rows"]] == ["ours", "float", "ours A=b"]
    assert mine["share_of_peak"] == pytest.approx(mine["images_per_second"][0] * mine["gflop_per_image"] / 100)
    assert theirs["images_per_second"][0] == mine["images_per_second"][0] / 2 == 2 * variant["images_per_second"][0]
    out = capsys.readouterr().out
    assert "matrix peak, GF/s: float32 100, int8 100" in out
    assert "| int8 | float | " in out
    assert "| 2.00x (2.00 to 2.00) | " in out


@pytest.mark.slow
def test_profile_accounts_for_the_step(shallow, capsys):
    profile_step.main(["lora", "--model", "tiny_test", "--size", "32", "--batch", "2", "--steps", "2"])
    rows = {
        cells[1].strip(): float(cells[2])
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| ") and "ms" not in line
        for cells in [line.split("|")]
    }
    whole, untraced = rows.pop("step"), rows.pop("step, not traced (median)")
    assert untraced > 0
    assert sum(rows.values()) == pytest.approx(whole, abs=0.1 * len(rows))
    assert rows["products of linear layers"] > 0


def test_profile_ends_an_operation_where_its_first_reader_starts():
    text = """
  %a.1 = f32[8]{0} fusion(%p), kind=kLoop, metadata={op_name="jit(step)/norm1/add"}
  ROOT %b = f32[8]{0} dot(%a.1, %q), metadata={op_name="jit(step)/head/dot_general"}
"""
    readers = profile_step.readers(text)
    assert readers["a.1"] == ["b"]
    assert "b" not in readers
    found = [("a.1", 0, 9), ("b", 3, 6), ("a.1", 10, 12), ("b", 13, 15)]  # two steps; the first end is marked late
    assert profile_step.clipped(found, readers) == [("a.1", 0, 3), ("b", 3, 6), ("a.1", 10, 12), ("b", 13, 15)]


def test_profile_shares_a_moment_among_those_that_run_in_it():
    found = [("a", 0, 4e9), ("b", 2e9, 4e9), ("c", 5e9, 6e9), ("unknown", 0, 9e9)]
    assert profile_step.shares(found, {"a": "x", "b": "y", "c": "x"}) == {"x": 4.0, "y": 1.0}
