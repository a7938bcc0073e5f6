"""Bad and hostile input to every command: exit code 2, a message that names the place, no traceback, nothing written."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import TINY

from vitft_jax import check_data, cli, compare, evaluate, look, predict, quantize, run, train
from vitft_jax import config as configs
from vitft_jax.build import build
from vitft_jax.export import __main__ as export
from vitft_jax.folder import Folder
from vitft_jax.report import __main__ as report

BUNDLED = Path(train.__file__).parent / "weights" / "phantom_micro"
CONFIG = f"""
from vitft_jax import config, vit

def get_config():
    vit.VARIANTS["tiny_test"] = {TINY}
    c = config.default()
    c.model.name, c.model.pretrained = "tiny_test", ""
    c.data.path, c.data.image_size = "images", 16
    c.data.val_fraction = c.data.test_fraction = 0.2
    c.train.batch_size, c.train.epochs, c.methods = 6, 1.0, ("lora",)
    return c
"""


@pytest.fixture
def world(image_folder, tmp_path, monkeypatch):
    """A working directory with images, a table, a config, and a run that has not trained yet."""
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "config.py").write_text(CONFIG)
    names = sorted(path.relative_to(tmp_path / "images").as_posix() for path in (tmp_path / "images").rglob("*.png"))
    (tmp_path / "images" / "labels.csv").write_text("path,label\n" + "".join(f"{n},{n[0]}\n" for n in names))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vitft_jax.runtime.start", lambda: None)  # once in a process is enough
    return tmp_path


@pytest.fixture(scope="session")
def template(image_folder, tmp_path_factory):
    """A run folder as train leaves it before the first checkpoint, whose images are at IMAGES."""
    root = tmp_path_factory.mktemp("template")
    (root / "config.py").write_text(CONFIG)
    config, source = run.resolve(configs.load(str(root / "config.py"), [f"data.path={image_folder}"]))
    folder = Folder(root / "run")
    dataset = folder.dataset(config)
    config.data.path = "IMAGES"
    folder.open(config, dataset, build(config, dataset, source))
    return root / "run"


@pytest.fixture
def started(world, template):
    """A copy of `template` in `world`."""
    folder = shutil.copytree(template, world / "run")
    text = (folder / "config.json").read_text().replace("IMAGES", str(world / "images"))
    (folder / "config.json").write_text(text)
    return folder


def files(root):
    """What lies below a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


COMMANDS = {
    "train": train.main,
    "evaluate": evaluate.main,
    "quantize": quantize.main,
    "predict": predict.main,
    "look": look.main,
    "export": export.main,
    "report": report.main,
    "compare": compare.main,
    "check_data": check_data.main,
}


def refused(command, arguments, root, capsys):
    """Runs a command; returns its message, having made sure of everything else."""
    before = files(root)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(lambda: COMMANDS[command](arguments))
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert "error: " in message
    assert "Traceback" not in message
    assert files(root) == before
    return message


# Each case: arguments beside `--config config.py --workdir new`, and what the message says.
SETTINGS = [
    ("config.lora.rnak=3", "unknown config key 'lora.rnak'; did you mean 'lora.rank'?"),
    ("config.lora.rank", "--config.lora.rank: write --config.lora.rank=VALUE"),
    ("config.lora.rank=many", "config key lora.rank='many': a whole number is needed"),
    ("config.lora.rank=-1", "lora.rank=-1"),
    ("config.lora.targets=(", "lora: '(' is none of"),
    ("config.lora.targets=", "lora.targets='': would match every layer; one of ['encoder', 'qkv', 'qv']"),
    ("config.train.trainable=", "config key train.trainable='': would match every name; '.' trains all of them"),
    ("config.lora.rank_pattern=3", "lora.rank_pattern=(3,): pairs of a regex and a rank"),
    ("config.lora.rank_pattern=(('x','y'),)", "lora.rank_pattern=(('x', 'y'),): pairs of a regex and a rank"),
    ("config.methods=1", "config.methods: unknown method '1'; choose one of"),
    ("config.train.lr=nan", "config key train.lr='nan'"),
    ("config.train.lr=1e999", "config key train.lr=inf: a finite number is needed"),
    ("config.train.epochs=1e999", "config key train.epochs=inf"),
    ("config.train.batch_size=0", "config key train.batch_size=0: at least 1"),
    ("config.train.batch_size=1000000000000", "train.batch_size"),
    (f"config.train.steps={'9' * 400}", "at most 2147483647"),
    ("config.data.path=~nobody_of_that_name/x", "config key data.path='~nobody_of_that_name/x': no user of that name"),
    ("config.init_adapter=~nobody_of_that_name/x", "config key init_adapter='~nobody_of_that_name/x': no user"),
    (f"config.model.pretrained={'x' * 300}", "File name too long; give another path"),
    ("config.train.accumulate=4", "does not divide into train.accumulate=4 micro-batches"),
    ("config.train.nan_retries=-1", "config key train.nan_retries=-1: at least 0"),
    ("config.train.best_metric=auc", "train.best_metric='auc'; did you mean 'auroc'?"),
    ("config.seed=-1", "seed = -1"),
    ("config.dtype=float16", "config key dtype='float16': one of 'float32', 'bfloat16'"),
    ("config.methods=lora,../../x", "'../../x'"),
    ("config.data.image_size=18", "data.image_size=18: not a multiple of the patch size 4"),
    ("config.data.image_size=1000000000", "data.image_size=1000000000"),
    ("config.data.val_fraction=0.999", "val_fraction"),
    ("config.data.workers=-1", "config key data.workers=-1: at least 0"),
    ("config.data.path=/dev/null", "data.path: there is no folder /dev/null"),
    ("config.data.table=/etc", "no table /etc"),
    ("config.model.pretrained=../nowhere/at/all", "no file or directory '../nowhere/at/all'"),
    ("workdri=x", "unknown flag '--workdri=x'; did you mean '--workdir'?"),
    ("workdir=config.py", "--workdir config.py: is a file"),
    ("workdir=config.py/run", "--workdir config.py/run: Not a directory"),
    (f"workdir={'x' * 300}", "File name too long"),
    ("workdir=images", "--workdir images: has files in it that are no run"),
    ("config=nowhere.py", "--config nowhere.py: no such file"),
    ("config=images", "--config images: no such file"),
    ("config=images/labels.csv", "--config images/labels.csv: not a Python file"),
]


@pytest.mark.parametrize(("argument", "message"), SETTINGS)
def test_settings_and_command_lines(world, capsys, argument, message):
    arguments = ["--config", "config.py", "--workdir", "new", f"--{argument}"]
    assert message in refused("train", arguments, world, capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "has no attribute 'get_config'"),
        ("def get_config(): return None", "get_config() returned NoneType"),
        ("def get_config(): return open('/nowhere')", "FileNotFoundError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("\0", "null bytes"),
    ],
)
def test_config_files(world, capsys, text, message):
    Path("bad.py").write_text(text)
    said = refused("train", ["--config", "bad.py", "--workdir", "new"], world, capsys)
    assert said.startswith("error: --config bad.py: ")
    assert message in said


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("../../etc/passwd,d", "row 32: '../../etc/passwd' leads out of the image folder"),
        ("dark/../../config.py,d", "row 32: 'dark/../../config.py' leads out of the image folder"),
        ("/etc/passwd,d", "row 32: '/etc/passwd' is an absolute path"),
        ("C:\\secret.png,d", "row 32: 'C:\\\\secret.png' is an absolute path"),
        ("http://host/x.png,d", "row 32: http:/host/x.png"),
        ("dark/0.png,d", "row 32: 'dark/0.png' is listed in row 2 already"),
        ("dark,d", "row 32: dark"),  # a folder
        ("dark/99.png,", "row 32: the label is blank"),
        ("dark/99.png", "row 32: 1 values for 2 columns"),
        ("dark/9\x009.png,d", "row 32: dark/9"),
        (f"dark/{'9' * 200_000}.png,d", "row 32: not valid CSV (field larger"),
        ("link.png,d", "link.png (labels.csv, row 32): is linked to"),
        ("out/0.png,d", "out/0.png (labels.csv, row 32): is linked to"),
        ("labels.csv,d", "Cannot read image labels.csv (labels.csv, row 32): not an image"),
    ],
)
def test_tables(world, capsys, row, message):
    (world / "outside" / "deep").mkdir(parents=True)
    Image.new("L", (8, 8)).save(world / "outside" / "deep" / "0.png")
    (world / "images" / "link.png").symlink_to(world / "outside" / "deep" / "0.png")
    (world / "images" / "out").symlink_to(world / "outside" / "deep")
    with (world / "images" / "labels.csv").open("a") as file:
        file.write(row + "\n")
    arguments = ["--config", "config.py", "--workdir", "new", "--config.data.table=labels.csv"]
    assert message in refused("train", arguments, world, capsys)


def bomb(path):
    """A PNG of a few hundred bytes that says it has 50,000 x 50,000 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    data = zlib.compress(b"\0" * 100_000)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def postscript(path):
    """PostScript, which Pillow would give to a program to draw."""
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\nshowpage\n")


IMAGES = {
    "no image": (lambda path: path.write_bytes(b"no image"), "not an image"),
    "empty": (lambda path: path.write_bytes(b""), "not an image"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:60]), "damaged"),
    "bomb": (bomb, "exceeds limit"),
    "postscript": (postscript, "not an image"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(print)), "not an image"),
    "pipe": (lambda path: path.unlink() or os.mkfifo(path), "the file is missing"),
    "device": (lambda path: path.unlink() or path.symlink_to("/dev/zero"), "is linked to /dev/zero, outside"),
    "link out": (lambda path: path.unlink() or path.symlink_to("/etc/passwd"), "is linked to /etc/passwd, outside"),
    "link to nothing": (lambda path: path.unlink() or path.symlink_to("nowhere.png"), "the file is missing"),
    "link to itself": (lambda path: path.unlink() or path.symlink_to(path.name), "damaged"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(world, capsys, name):
    make, message = IMAGES[name]
    make(world / "images" / "grey" / "3.png")
    said = refused("train", ["--config", "config.py", "--workdir", "new"], world, capsys)
    assert "grey/3.png" in said
    assert message in said


def test_a_name_that_is_not_utf8(world, capsys):
    try:
        shutil.copy("images/grey/3.png", b"images/grey/\xff.png")
    except OSError:
        pytest.skip("this file system refuses such names itself")
    said = refused("train", ["--config", "config.py", "--workdir", "new"], world, capsys)
    assert "'grey/\\udcff.png' is not a name in UTF-8" in said


class Runs:
    """An object whose pickle runs code when it is loaded."""

    def __reduce__(self):
        return os.system, ("echo run",)


def safetensors(header, data=b"\0" * 16, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


WEIGHTS = {
    "header longer than the file": safetensors(tensor(), length=10**6),
    "header of exabytes": safetensors(tensor(), length=2**62),
    "header that is no JSON": safetensors(b"{'a': 1}"),
    "header nested without end": safetensors(b'{"a":' * 100_000),
    "offsets beyond the file": safetensors(tensor(offsets=(0, 10**9))),
    "offsets backwards": safetensors(tensor(offsets=(16, 0))),
    "negative offsets": safetensors(tensor(offsets=(-16, 0))),
    "overlapping tensors": safetensors(tensor() | {"b": tensor()["a"]}),
    "shape larger than the data": safetensors(tensor(shape=(10**9, 10**9))),
    "shape that overflows": safetensors(tensor(shape=(2**33, 2**33, 2**33))),
    "unknown dtype": safetensors(tensor(dtype="PICKLE")),
    "other dtype": safetensors(tensor(dtype="I64", shape=(2,))),
    "bytes left over": safetensors(tensor(), data=b"\0" * 64),
    "pickle": pickle.dumps(Runs()),
    "nothing": b"",
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_files(world, capfd, name):
    Path("w.safetensors").write_bytes(WEIGHTS[name])
    arguments = [
        "--config",
        "config.py",
        "--workdir",
        "new",
        "--config.model.name=",
        "--config.model.pretrained=w.safetensors",
    ]
    said = refused("train", arguments, world, capfd)
    assert "w.safetensors: " in said
    assert "\nrun\n" not in said


def test_weights_with_a_config_that_lies(world, capsys):
    shutil.copytree(BUNDLED, "weights")
    lies = {"hidden_size": 10**9, "num_hidden_layers": 10**6, "image_size": 10**7, "patch_size": 0, "hidden_act": ["x"]}
    for key, value in lies.items():
        text = json.loads((BUNDLED / "config.json").read_text()) | {key: value}
        Path("weights/config.json").write_text(json.dumps(text))
        arguments = [
            "--config",
            "config.py",
            "--workdir",
            "new",
            "--config.model.name=",
            "--config.model.pretrained=weights",
        ]
        assert "weights" in refused("train", arguments, world, capsys)


@pytest.mark.parametrize("kind", ["objects", "member", "bomb"])
@pytest.mark.parametrize("key", ["data.path", "model.pretrained"])
def test_archives(world, capfd, kind, key):
    if kind == "objects":
        np.savez("x.npz", train_images=np.array([Runs()], dtype=object), train_labels=np.zeros((1, 1), np.uint8))
    else:
        np.savez("x.npz", train_labels=np.arange(30) % 3)
        with zipfile.ZipFile("x.npz", "a", zipfile.ZIP_DEFLATED) as archive:
            if kind == "member":
                archive.writestr("train_images.npy", pickle.dumps(Runs()))
            else:  # a header that asks for a terabyte
                with archive.open("train_images.npy", "w") as file:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (30, 10**5, 10**6)}
                    np.lib.format.write_array_header_1_0(file, header)
    arguments = ["--config", "config.py", "--workdir", "new", "--config.model.name=", f"--config.{key}=x.npz"]
    said = refused("train", arguments, world, capfd)
    assert "x.npz: " in said
    assert "\nrun\n" not in said


RUNS = {
    "config.json cut off": (lambda run: (run / "config.json").write_text('{"seed": '), "config.json: not valid JSON"),
    "config.json of no object": (lambda run: (run / "config.json").write_text("[]"), "config.json: expected a JSON object"),
    "config.json with an unknown key": (lambda run: change(run / "config.json", lorra=1), "config.json: unknown key 'lorra'"),
    "config.json with a wrong type": (lambda run: change(run / "config.json", seed="x"), "config.json: seed is 'x'; a whole"),
    "config.json with a wrong value": (lambda run: change(run / "config.json", dtype="int4"), "dtype='int4'"),
    "config.json not in UTF-8": (lambda run: (run / "config.json").write_bytes(b"\xff"), "config.json: cannot be read"),
    "run.json cut off": (lambda run: (run / "run.json").write_text("{"), "run.json: cannot be read"),
    "run.json without a key": (lambda run: (run / "run.json").write_text("{}"), "run.json: no object with weights"),
    "run.json nested without end": (lambda run: (run / "run.json").write_text("[" * 10**6), "run.json: cannot be read"),
    "run.json of other classes": (lambda run: change(run / "run.json", classes=["a", "b", "c"]), "none of the classes a, b, c"),
    "run.json of other weights": (lambda run: change(run / "run.json", weights={}), "its weights were {} when it was started"),
    "run.json of classes that are none": (lambda run: change(run / "run.json", classes=3), "run.json: weights, classes or"),
    "run.json of an odd model": (lambda run: change(run / "run.json", model=3, mean="x"), "run.json: says of the model"),
    "split.csv not in UTF-8": (lambda run: (run / "split.csv").write_bytes(b"path,label,split\n\xff,a,train\n"), "split.csv"),
    "split.csv of one giant field": (lambda run: (run / "split.csv").write_text("9" * 200_000), "split.csv"),
    "split.csv gone": (lambda run: (run / "split.csv").unlink(), "There is no table"),
    "split.csv that leads out": (lambda run: (run / "split.csv").write_text("path,label\n../x.png,a\n"), "split.csv, row 2"),
    "split.csv without a row": (lambda run: cut_line(run / "split.csv"), "split.csv: has changed since the run was started"),
    "images gone": (lambda run: shutil.rmtree("images/grey"), "10 of 30 images are not in"),
    "no checkpoint": (lambda run: None, "checkpoints: no checkpoint here"),
    "no run": (shutil.rmtree, "--workdir run: no run here"),
}  # fmt: skip


def cut_line(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", RUNS)
def test_run_folders(world, started, capsys, name):
    damage, message = RUNS[name]
    damage(started)
    assert message in refused("evaluate", ["--workdir", "run"], world, capsys)
    if name not in ("no checkpoint", "no run"):
        said = refused("train", ["--config", "config.py", "--workdir", "run"], world, capsys)
        assert message in said or "holds another run" in said
    if "json" in name:
        assert message in refused("quantize", ["--workdir", "run", "--output", "new"], world, capsys)
    if "json" in name and name != "run.json of other classes":  # these commands read no labels
        images = ["--images", "images/grey", "--output"]
        assert message in refused("predict", ["--workdir", "run", *images, "new.csv"], world, capsys)
        assert message in refused("look", ["--workdir", "run", *images, "new"], world, capsys)
        export_to = ["--workdir", "run", "--format", "hf", "--output", "new"]
        assert message in refused("export", export_to, world, capsys)


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("train", [], "the following arguments are required: --config"),
        ("evaluate", [], "the following arguments are required: --workdir"),
        ("evaluate", ["--workdir", "run", "--split", "tests"], "--split tests: one of train, val, test"),
        ("evaluate", ["--workdir", "run", "--name", "../x"], "--name ../x"),
        ("evaluate", ["--workdir", "run", "--config.lora.rank=2"], "lora.rank belongs to the training of this run"),
        ("evaluate", ["--workdir", "images"], "--workdir images: no run here"),
        ("quantize", ["--workdir", "run", "--output", "images"], "--output images: exists already"),
        ("quantize", ["--workdir", "run", "--output", "new", "--images", "0"], "--images 0"),
        ("quantize", ["--workdir", "run", "--output", "new", "--bits", "many"], "argument --bits: invalid int value: 'many'"),
        ("quantize", ["--workdir", "nowhere", "--output", "new"], "--workdir nowhere: no run here"),
        ("predict", ["--workdir", "run", "--images", "images"], "the following arguments are required: --output"),
        ("predict", ["--workdir", "run", "--images", "nowhere", "--output", "new.csv"], "nowhere"),
        ("predict", ["--workdir", "nowhere", "--images", "images", "--output", "new.csv"], "--workdir nowhere: no run here"),
        ("predict", ["--workdir", "run", "--images", "images", "--output", "config.py/new.csv"], "config.py"),
        ("look", ["--workdir", "nowhere"], "--workdir nowhere: no run here"),
        ("look", ["--workdir", "run", "--images", "images"], "--output"),
        ("export", ["--workdir", "run", "--format", "pickle", "--output", "new"], "--format pickle: choose one of hf"),
        ("export", ["--workdir", "run", "--format", "hf", "--output", "images"], "--output images: exists already"),
        ("export", ["--workdir", "nowhere", "--format", "hf", "--output", "new"], "--workdir nowhere: no run here"),
        ("report", ["nowhere"], "nowhere: no run here"),
        ("report", ["run", "nowhere", "--output", "new.html"], "nowhere: no run here"),
        ("compare", ["run"], "the following arguments are required"),
        ("compare", ["run", "nowhere"], "run/predictions_test.csv: no table of predictions"),
        ("check_data", ["--config", "config.py", "--config.data.path=nowhere"], "nowhere"),
        ("check_data", ["--config", "config.py", "--output", "config.py"], "config.py: File exists; give another path"),
    ],
)  # fmt: skip
def test_other_commands(world, started, capsys, command, arguments, message):
    assert message in refused(command, arguments, world, capsys)


def test_a_command_as_users_start_it(world, pytestconfig):
    arguments = ["--config", "config.py", "--workdir", "new", "--config.data.table=/etc/passwd"]
    before = files(world)
    environment = {**os.environ, "PYTHONPATH": str(pytestconfig.rootpath)}
    command = [sys.executable, "-m", "vitft_jax.train", *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: /etc/passwd")
    assert result.stderr.count("\n") == 1
    assert files(world) == before


def test_links_are_followed_where_the_user_says_so(world):
    (world / "elsewhere").mkdir()
    for path in (world / "images").rglob("*.png"):
        path.rename(world / "elsewhere" / f"{path.parent.name}{path.name}")
        path.symlink_to(world / "elsewhere" / f"{path.parent.name}{path.name}")
    (world / "also").symlink_to(world / "images")  # a link to the whole folder needs no leave
    config = configs.load("config.py", ["data.path=also", "data.links=True"])
    assert len(Folder(world / "new").dataset(config)) == 30
