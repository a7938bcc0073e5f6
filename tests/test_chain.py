"""The chain against full fine-tuning, by scripts/chain.py."""

import json

import chain
import contest
import folders
import pytest
import seeds

from vitft_jax.errors import InputError


def changed(path, **parts):
    """Puts entries into the parts of a summary."""
    summary = json.loads((path / "summary.json").read_text())
    for part, entries in parts.items():
        summary[part] = {**summary.get(part, {}), **entries}
    (path / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def runs(tmp_path):
    """Two seeds of full fine-tuning, of LoRA, and of its int8; the third arm has one seed."""
    for i, arm in enumerate(("full", "LoRA-skipping", "int8")):
        for seed in (0, 1)[: 1 if arm == "int8" else 2]:
            path = folders.write(tmp_path / f"{arm}_seed{seed}", seed=10 * i + seed)
            parts = {"parameters": {"trainable_percent": (100.0, 0.69, 0.0)[i]}, "method": {}}
            if arm == "int8":
                parts["method"]["source"] = str(tmp_path / f"LoRA-skipping_seed{seed}")
                parts["bytes"] = {"arrays": 1000}
            changed(path, flops={"forward": (4e9, 3e9, 3e9)[i]}, **parts)
    return tmp_path


def test_a_row_follows_the_chain(runs, capsys, monkeypatch):
    """Trained share from the run before int8, bytes from the int8, differences on shared seeds, ratios by round."""
    arms = ["full", "LoRA-skipping", "int8"]
    speeds = {"transformers": [2.0, 4.0], "full": [3.0, 5.0], "LoRA-skipping": [6.0, 12.0], "int8": [14.0, 28.0]}
    monkeypatch.setattr(chain, "race", lambda folder, arms, options: speeds)
    chain.main([str(runs), "--arms", *arms, "--publish", str(runs / "docs")])
    shown = capsys.readouterr().out.splitlines()
    assert (runs / "docs" / f"{runs.name}_speed.md").read_text().splitlines() == shown
    assert shown[-1].startswith("Batch 32, 9 rounds; ")
    shown = shown[:-2]
    head, _, peer, *rows = [line[2:-2].split(" | ") for line in shown if line.startswith("|")]
    full, _, int8 = (dict(zip(head, row, strict=True)) for row in rows)
    assert peer[-2].startswith("3.0")
    assert (full["trains"], full["seeds"], int8["trains"], int8["seeds"]) == ("100.00 %", "2", "0.69 %", "1")
    assert (full["bytes"], int8["bytes"]) == ("0.0 MB (1.000x)", "0.0 MB (0.250x)")
    assert int8["FLOPs"] == "0.750x"
    assert int8["ratio to transformers"].startswith("7.00x")
    change = seeds.pooled_change([runs / "full_seed0"], [runs / "int8_seed0"])["accuracy"]
    assert int8["change from full"].startswith(f"{change['value']:+.3f} (")
    assert full["change from full"] == ""
    own = seeds.pooled([runs / "int8_seed0"])["accuracy"]["value"]
    within = own >= seeds.pooled([runs / "full_seed0", runs / "full_seed1"])["accuracy"]["low"]
    assert shown[-1].startswith("- int8: trainable yes, bytes yes, accuracy not below the interval of full ")
    assert shown[-1].endswith(f"full {'yes' if within else 'no'}, speed yes")
    assert "bytes no" in shown[-2]
    assert "speed no" in shown[-2]


def test_a_sweep_that_was_moved_is_read(runs):
    moved = runs.parent / "moved"
    runs.rename(moved)
    assert chain.read(moved, "int8").trainable == 0.69
    moved.rename(runs)


def test_what_is_missing_is_named(runs, capsys):
    with pytest.raises(InputError, match="no sweep was started there"):
        chain.main([str(runs), "--no-race"])
    names = ("full_seed0", "int8_seed0", "int8-static_seed0", "full_seed1")
    (runs / "status.json").write_text(json.dumps({"runs": dict.fromkeys(names, "done")}))
    assert chain.arms_of(runs) == ["full", "int8", "int8-static"]
    with pytest.raises(InputError, match="no finished run int8-static_seed0"):
        chain.main([str(runs), "--no-race"])
    with pytest.raises(InputError, match="--metric acuracy: the task has accuracy"):
        chain.main([str(runs), "--arms", "full", "int8", "--no-race", "--metric", "acuracy"])
    chain.main([str(runs), "--arms", "full", "int8", "--no-race"])
    assert "transformers |" not in capsys.readouterr().out


def test_the_race_is_of_the_first_seeds_and_of_the_exported_first_arm(runs, monkeypatch):
    started, exported = [], []

    class Here:
        def __init__(self, name, command):
            self.name, self.seconds = name, {"inference 4": [0.5, 0.25]}
            started.append((name, command[1:]))

    monkeypatch.setattr(contest, "Contestant", Here)
    monkeypatch.setattr(contest, "race", lambda contestants, rounds: None)
    monkeypatch.setattr(chain, "export", lambda *arguments: exported.append(arguments))
    options = chain.argparse.Namespace(batch=4, steps=2, rounds=2)
    arms = [chain.read(runs, name) for name in ("full", "int8")]
    assert chain.race(runs, arms, options) == {c: [8.0, 16.0] for c in ("transformers", "full", "int8")}
    assert exported == [(runs / "full_seed0", runs / "transformers_full_seed0", "hf")]
    assert [name for name, _ in started] == ["transformers", "full", "int8"]
    assert [command[0] for _, command in started[1:]] == [str(runs / "full_seed0"), str(runs / "int8_seed0")]


@pytest.mark.interop
def test_transformers_takes_its_turn(tmp_path, tiny_config):
    """In a process of its own, with a model that was exported from a run."""
    pytest.importorskip("transformers")
    from vitft_jax import train
    from vitft_jax.export import export

    tiny_config.train.steps = 1
    train.train(tiny_config, tmp_path / "full")
    export(tmp_path / "full", tmp_path / "transformers", "hf")
    peer = contest.Contestant(
        "transformers", [chain.__file__, str(tmp_path / "transformers"), "--serve", "--batch", "2"]
    )
    contest.race([peer], 2)
    assert peer.works == ["inference 2"]
    assert all(seconds > 0 for seconds in peer.seconds["inference 2"])
