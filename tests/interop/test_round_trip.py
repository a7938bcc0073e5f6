"""The script that exports runs and opens them in every library, on runs that were never trained."""

import importlib.util
from dataclasses import replace

import exports
import pytest

for package in ("torch", "transformers", "peft", "timm", "onnx", "onnxruntime"):
    pytest.importorskip(package)

from vitft_jax.decision import Decision  # noqa: E402
from vitft_jax.errors import InputError  # noqa: E402
from vitft_jax.ptq.options import Options  # noqa: E402
from vitft_jax.quantize import quantize  # noqa: E402

pytestmark = pytest.mark.interop


@pytest.fixture(scope="module")
def script(pytestconfig):
    spec = importlib.util.spec_from_file_location("round_trip", pytestconfig.rootpath / "scripts" / "round_trip.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs(image_folder, tmp_path_factory):
    """Two seeds in float, one of them in bfloat16 and in int8."""
    root = tmp_path_factory.mktemp("runs")
    base = exports.write_base(root / "base", "vit", eps=1e-6)
    for seed, dtype in ((0, "float32"), (1, "bfloat16")):
        exports.hand_made(
            root / f"lora_{seed}", exports.config_for(image_folder, base, "lora", seed=seed, dtype=dtype), Decision(1.5)
        )
    quantize(root / "lora_0", root / "int8_0", Options(sensitivity_images=0))
    return root


def table(text):
    """Cells of the rows by kind, format and library."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {tuple(row[:3]): row[3:] for row in rows[2:]}


def test_every_format_is_opened_and_says_the_same(script, runs, capsys):
    script.main([str(runs / name) for name in ("lora_0", "lora_1", "int8_0")])
    said = capsys.readouterr().out
    rows = table(said)
    libraries = [(form, library) for form, openers in script.OPENERS.items() for library in openers]
    kept = [("onnx", "ONNX Runtime"), ("stablehlo", "jax")]
    half = [("the run", "vitft_jax, bfloat16"), ("stablehlo", "jax, bfloat16")]
    own = ("the run", "vitft_jax, float32")
    shaken = ("the run", "vitft_jax, changed by 1e-06")
    wanted = {("float", *x) for x in (*libraries, own, *half)} | {("int8", *x) for x in (*kept, own, shaken)}
    assert rows.keys() == wanted
    assert float(rows["int8", *shaken][0]) > 0
    for (kind, form, library), (apart, same, points, size, _) in rows.items():
        count = 6 if kind == "int8" or form in ("the run", "stablehlo") else 12  # two seeds in one row
        assert same.endswith(f" of {count}")
        assert float(size) > 0
        if "bfloat16" not in library:
            assert float(apart) < (1e-3 if kind == "int8" else script.WIDER.get(library, script.APART))
            assert (same, points) == (f"{count} of {count}", "+0.00")
    assert float(rows["float", *half[0]][0]) > script.APART  # else the others were not compared in float32
    assert float(rows["float", *half[1]][0]) < script.WIDER["jax, bfloat16"]
    assert "int8_0: not as hf: " in said


def test_what_differs_ends_it_with_exit_code_1(script, runs, monkeypatch, capsys):
    def other(folder, about):
        answer = openers["onnx"]["ONNX Runtime"](folder, about)
        return lambda images, pixels: answer(images, 255 - pixels)

    openers = script.OPENERS
    monkeypatch.setattr(script, "OPENERS", {"onnx": {"ONNX Runtime": other}})
    with pytest.raises(SystemExit) as stop:
        script.main([str(runs / "lora_0"), "--split=all"])
    assert stop.value.code == 1
    said = capsys.readouterr()
    assert " of 30 | " in said.out
    assert said.err.startswith("missed: float, onnx in ONNX Runtime: a probability differs by ")


def test_the_bounds(script):
    row = script.Row("float", "onnx", "ONNX Runtime", 9e-5, 200, 150, 0, 1.0, 1.0, 184)
    assert not row.missed()
    assert "differs by 2.0e-04, more than 0.0001" in replace(row, apart=2e-4).missed()
    assert not replace(row, apart=2e-4, library="transformers").missed()
    int8 = replace(row, kind="int8, static ranges", apart=0.5, same=199)
    assert not int8.missed()
    assert "198 of 200 decisions are ours, below 99.5 %" in replace(int8, same=198).missed()
    first, second = script.pooled([row, replace(int8, same=199), replace(row, apart=2e-5, same=100, gained=-3)])
    assert (first.images, first.same, first.gained, first.apart) == (400, 250, -3, 9e-5)
    assert "| 250 of 400 | -0.75 |" in first.cells()
    assert second.kind == "int8, static ranges"


def test_it_trains_and_quantises_twice_where_no_runs_are_given(script, image_folder, tmp_path):
    base = exports.write_base(tmp_path / "base", "vit")
    changes = {
        "model.pretrained": base, "data.path": image_folder, "data.image_size": 16, "data.source": "folder",
        "data.test_fraction": 0.2, "train.steps": 2, "train.batch_size": 4, "figures.count": 0,
    }  # fmt: skip
    runs = script.made(tmp_path, [f"{key}={value}" for key, value in changes.items()])
    assert [script.kind_of(script.Folder(path).config()) for path in runs] == [
        "float",
        "int8",
        "int8, static ranges",
    ]
    assert all(script.Folder(path).results()["best_step"] == 2 for path in runs)


def test_refusals(script, runs):
    with pytest.raises(InputError, match="--split tests: did you mean 'test'"):
        script.main([str(runs / "lora_0"), "--split=tests"])
    with pytest.raises(InputError, match="--formats onyx: did you mean 'onnx'"):
        script.main([str(runs / "lora_0"), "--formats", "hf", "onyx"])
    with pytest.raises(InputError, match=r"--config\.seed=1: is for the run that is trained here"):
        script.main([str(runs / "lora_0"), "--config.seed=1"])
    with pytest.raises(InputError, match="no run here"):
        script.main([str(runs / "nowhere")])
