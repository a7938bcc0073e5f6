"""The command predict and `vitft_jax.load`, end to end on tiny runs without their training data."""

import csv
import os
import shutil
import threading

import numpy as np
import pytest
from PIL import Image
from support import TINY

import vitft_jax
from vitft_jax import config as configs
from vitft_jax import decision, inputs, predict, quantize, sheets, step, train, vit
from vitft_jax.decision import Decision
from vitft_jax.errors import InputError
from vitft_jax.ptq.options import Options
from vitft_jax.ptq.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


@pytest.fixture(autouse=True)
def variant(monkeypatch):
    monkeypatch.setitem(vit.VARIANTS, "tiny_test", TINY)


def config_for(folder, **changes):
    config = configs.default()
    config.methods, config.model.name, config.model.pretrained = ("lora",), "tiny_test", ""
    config.data.path, config.data.image_size = str(folder), 16
    config.data.val_fraction = config.data.test_fraction = 0.2
    config.train.batch_size, config.train.lr, config.train.epochs = 4, 1e-2, 3.0
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def runs(image_folder, tmp_path_factory):
    """LoRA runs of one label and of several, and an int8 run; the images that they trained on are gone."""
    root = tmp_path_factory.mktemp("runs")
    shutil.copytree(image_folder, root / "images")
    names = sorted(p.relative_to(image_folder).as_posix() for p in image_folder.rglob("*.png"))
    rows = [f"{name},{int(not name.startswith('dark'))},{int(name.startswith('light'))}" for name in names]
    (root / "images" / "labels.csv").write_text("path,visible,bright\n" + "\n".join(rows) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vit.VARIANTS, "tiny_test", TINY)
        train.train(config_for(root / "images"), root / "one")
        several = {"data.table": "labels.csv", "data.labels": ("visible", "bright"), "train.class_weights": True}
        train.train(config_for(root / "images", **several), root / "several")
        quantize.quantize(root / "one", root / "int8", Options(Recipe(smooth=False), sensitivity_images=0))
        second = config_for(root / "images", **{"methods": (), "model.name": "", "model.pretrained": str(root / "one")})
        train.train(second, root / "second")
    shutil.rmtree(root / "images")
    return root


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table_of(rows, path, folder):
    """A table of the images that a run has predicted, in another order, with what is true of them."""
    columns = [c for c in rows[0] if c.startswith("true")]
    heads = ["label" if c == "true" else c.removeprefix("true:") for c in columns]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["note", "path", *heads])
        writer.writerows(["", str(folder / row["path"]), *(row[c] for c in columns)] for row in rows[::-1])
    return path


@pytest.mark.parametrize("name", ["one", "several", "int8", "second"])
def test_says_of_the_test_images_what_evaluation_said(runs, image_folder, tmp_path, name, capsys):
    said = read(runs / name / "predictions_test.csv")
    table = table_of(said, tmp_path / "table.csv", image_folder)
    assert predict.predict(runs / name, table, tmp_path / "out.csv") == []
    written = read(tmp_path / "out.csv")
    assert len(written) == len(said) >= 6
    for ours, theirs in zip(written, said[::-1], strict=True):
        assert {k: v for k, v in ours.items() if k != "path"} == {
            k: v for k, v in theirs.items() if k not in ("path", "group")
        }
    decided = [c for c in said[0] if c.startswith("predicted")]
    right = sum(all(row[c] == row[c.replace("predicted", "true")] for c in decided) for row in said)
    what = "have all labels right" if name == "several" else "are right"
    told = capsys.readouterr().out
    assert f"\n{right} of {len(said)} images with a true label {what}\n" in told
    assert "accuracy" not in told  # a number without an interval, which the groups would be needed for


def test_arrays_images_and_files_of_one_picture_are_one(runs, image_folder, tmp_path):
    model = vitft_jax.load(str(runs / "one"))
    files = sorted(image_folder.rglob("*.png"))[:7]
    opened = [Image.open(file) for file in files]
    arrays = [np.asarray(image) for image in opened]
    assert predict.predict(runs / "one", image_folder, tmp_path / "out.csv") == []
    rows = {row["path"]: row for row in read(tmp_path / "out.csv")}
    expected = [[float(rows[f.relative_to(image_folder).as_posix()][f"p:{c}"]) for c in model.classes] for f in files]
    for images in (arrays, opened, np.stack(arrays)[..., None].repeat(3, -1), [np.dstack([a] * 3) for a in arrays]):
        found = model.predict(images)
        np.testing.assert_allclose(found.probabilities, expected, atol=5e-7)
        np.testing.assert_array_equal(found.decisions, np.argmax(expected, axis=1))
        assert found.labels == tuple((model.classes[i],) for i in found.decisions)
    one = [model.predict([array]).probabilities[0] for array in arrays]
    np.testing.assert_array_equal(one, model.predict(arrays).probabilities)  # neighbours in a batch change nothing


def test_compiles_once_for_any_number_of_images(runs):
    model = vitft_jax.load(runs / "one")
    before = step.eval_step._cache_size()
    for count in (1, 4, 5, 9):
        result = model.predict([np.full((20, 30), 10 * i, np.uint8) for i in range(count)])
        assert result.probabilities.shape == (count, 3)
        np.testing.assert_allclose(result.probabilities.sum(axis=1), 1)
    assert step.eval_step._cache_size() == before + 1
    assert model.predict([]).probabilities.shape == (0, 3)
    assert model.predict([]).labels == ()


@pytest.mark.parametrize("flag", ["output", "grid", "mistakes"])
def test_nothing_is_written_over_what_is_read(runs, image_folder, tmp_path, flag):
    shutil.copytree(image_folder, tmp_path / "images")
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    table = tmp_path / "mine.csv"
    table.write_text("path,label\n" + "\n".join(f"{name},{name.split('/')[1]}" for name in names) + "\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "link.png").symlink_to(tmp_path / names[0])
    outputs = {"output": tmp_path / "out.csv", "grid": tmp_path / "grid.png", "mistakes": tmp_path / "mistakes.png"}
    taken = [(table if flag == "output" else tmp_path / names[3]), tmp_path / "link.png"]
    if flag != "output":
        taken.append(outputs["mistakes" if flag == "grid" else "grid"])
    for path in taken:
        with pytest.raises(InputError, match="give another file, so that nothing is lost"):
            predict.predict(runs / "one", table, **{**outputs, flag: path})
        assert before == {path: path.read_bytes() for path in before}
        assert not outputs["output"].exists()


def test_a_name_that_no_table_can_hold(tmp_path, image_folder):
    os.makedirs(tmp_path / "scans")
    shutil.copy(next(image_folder.rglob("*.png")), os.fsencode(tmp_path) + b"/scans/m\xfcller.png")
    with pytest.raises(InputError, match=r"the name of 'm\\udcfcller\.png' is not UTF-8"):
        inputs.find(tmp_path / "scans", ("a", "b"), False)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([np.zeros((4, 4))], r"image 0: float64 of shape \(4, 4\) is no image"),
        ([np.zeros((4, 4), np.uint8), np.zeros((4, 4, 2), np.uint8)], "image 1: uint8 of shape"),
        (["a.png"], "image 0: a str is no image"),
        (np.zeros((8, 8, 3), np.uint8), "put one image into a list"),
        (Image.new("L", (4, 4)), "put one image into a list"),
    ],
)
def test_what_is_no_image_is_refused(runs, images, message):
    with pytest.raises(InputError, match=message):
        vitft_jax.load(runs / "one").predict(images)


def test_temperature_and_thresholds_are_the_runs_own(runs, tmp_path):
    workdir = shutil.copytree(runs / "several", tmp_path / "run")
    images = [np.zeros((16, 16), np.uint8), np.full((16, 16), 255, np.uint8)]
    decision.write(workdir, Decision(1.0, (0.0, 1.0)), ("visible", "bright"))
    cold = vitft_jax.load(workdir).predict(images)
    assert cold.labels == (("visible",), ("visible",))
    decision.write(workdir, Decision(2.0), ("visible", "bright"))
    warm = vitft_jax.load(workdir).predict(images).probabilities
    np.testing.assert_allclose(
        np.log(warm / (1 - warm)), np.log(cold.probabilities / (1 - cold.probabilities)) / 2, rtol=1e-6
    )
    (workdir / decision.FILE).unlink()  # a run that is still training
    assert vitft_jax.load(workdir).decision == decision.RAW


def test_a_folder_with_bad_images_gives_the_others(runs, image_folder, tmp_path, capsys):
    scans = tmp_path / "scans"
    (scans / "deep" / "er").mkdir(parents=True)
    (scans / ".hidden").mkdir()
    shutil.copy(image_folder / "dark" / "1.png", scans / "b.PNG")
    shutil.copy(image_folder / "light" / "1.png", scans / "deep" / "er" / "a.png")
    shutil.copy(image_folder / "light" / "1.png", scans / ".hidden" / "c.png")
    (scans / "notes.txt").write_text("no image")
    (scans / "broken.png").write_bytes((scans / "b.PNG").read_bytes()[:80])
    (scans / "empty.jpg").write_bytes(b"")
    output, grid = tmp_path / "out.csv", tmp_path / "grid.png"
    command = [f"--workdir={runs / 'one'}", f"--images={scans}", f"--output={output}", f"--grid={grid}"]
    with pytest.raises(SystemExit) as stop:
        predict.main(command)
    assert stop.value.code == predict.SOME_FAILED == 3
    error = capsys.readouterr().err
    assert "broken.png" in error
    assert "empty.jpg" in error
    assert "2 images could not be read" in error
    assert [row["path"] for row in read(output)] == ["b.PNG", "deep/er/a.png"]
    assert list(read(output)[0]) == ["path", "predicted", "p:dark", "p:grey", "p:light"]
    with Image.open(grid) as sheet:
        assert sheet.width > 300
    (scans / "b.PNG").unlink()
    shutil.rmtree(scans / "deep")
    output.unlink()
    with pytest.raises(InputError, match=r"none of 2 images can be read, such as: .*broken\.png"):
        predict.predict(runs / "one", scans, output)
    assert not output.exists()


def test_an_image_that_goes_away_has_an_empty_place_on_the_sheet(runs, image_folder, tmp_path, monkeypatch):
    scans, output = tmp_path / "scans", tmp_path / "out.csv"
    shutil.copytree(image_folder / "dark", scans)
    write = predict.report.write_text

    def write_and_lose(path, text):
        write(path, text)
        (scans / "3.png").unlink()

    monkeypatch.setattr(predict.report, "write_text", write_and_lose)
    drawn = []
    monkeypatch.setattr(predict.sheets, "draw", lambda path, tiles, title: drawn.extend(tiles))
    assert predict.predict(runs / "one", scans, output, grid=tmp_path / "grid.png") == []
    assert len(read(output)) == 10
    assert [tile.caption.split("\n")[0] for tile in drawn if tile.image is None] == ["3.png"]
    assert len(drawn) == 10


@pytest.mark.parametrize("name", ["pipe", "pipe.png", "pipe.dcm"])
def test_a_named_pipe_is_no_image_and_nothing_waits_for_it(tmp_path, name):
    pytest.importorskip("pydicom", reason="needs pydicom, an optional dependency")
    os.mkfifo(tmp_path / name)
    Image.new("L", (9, 9)).save(tmp_path / "z.png")
    (tmp_path / "t.csv").write_text(f"path\n{name}\nz.png\n")
    said = []

    def look():
        for images in (tmp_path, tmp_path / "t.csv"):
            for item in inputs.find(images, ("a", "b"), False).items:
                try:
                    item.read(0)
                    said.append(item.name)
                except InputError as error:
                    said.append(str(error))
        with pytest.raises(InputError, match="there is no such file or folder"):
            inputs.find(tmp_path / name, ("a", "b"), False)
        said.append("and refused by itself")

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    fault = f"Cannot read image {tmp_path / name}: the file is missing."
    in_folder = [] if name == "pipe" else [fault]  # which without an extension is passed over, as a text file is
    assert said == [*in_folder, "z.png", fault, "z.png", "and refused by itself"]


def test_one_file_and_class_folders(runs, image_folder, tmp_path, capsys):
    predict.predict(runs / "one", image_folder / "dark" / "1.png", tmp_path / "out.csv")
    assert [row["path"] for row in read(tmp_path / "out.csv")] == ["1.png"]
    mistakes = tmp_path / "mistakes.png"
    predict.predict(runs / "one", image_folder, tmp_path / "all.csv", mistakes=mistakes)
    rows = read(tmp_path / "all.csv")
    assert all(row["true"] == row["path"].split("/")[0] for row in rows)
    wrong = sum(row["true"] != row["predicted"] for row in rows)
    said = capsys.readouterr().out
    assert f"{30 - wrong} of 30 images with a true label are right" in said
    assert f"{wrong} mistakes in 30 images" in said
    assert mistakes.is_file()


def test_mistakes_come_with_the_most_certain_first():
    class Model:
        multilabel = False

        def decide(self, p):
            return p.argmax(axis=1)

    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.99, 0.01], [0.7, 0.3]])
    labels = np.array([1, 1, 1, inputs.UNKNOWN, 0])
    np.testing.assert_array_equal(predict._mistakes(Model(), labels, p), [0, 1])


def test_unknown_labels_are_blank_and_do_not_count(runs, image_folder, tmp_path, capsys):
    table = tmp_path / "t.csv"
    table.write_text(f"path,label\n{image_folder}/dark/1.png,dark\n{image_folder}/dark/2.png,\n")
    predict.predict(runs / "one", table, tmp_path / "out.csv")
    assert [row["true"] for row in read(tmp_path / "out.csv")] == ["dark", ""]
    assert "1 of 1 images with a true label are right" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file\na.png\n", "there is no column 'path'"),
        ("path,label\na.png,drak\n", "row 2: label 'drak' is none of the model's classes; did you mean 'dark'"),
        ("path\n", "has no rows"),
        ("path,label\n,dark\n", "row 2: the path is blank"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        inputs.find(tmp_path / "t.csv", ("dark", "grey"), False)


def test_tables_of_several_labels_give_all_or_none(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("path,a,b\nx.png,1,0\ny.png,,1\n")
    found = inputs.find(table, ("b", "a"), True)
    np.testing.assert_array_equal(found.labels, [[0, 1], [1, inputs.UNKNOWN]])
    assert [item.path for item in found.items] == [tmp_path / "x.png", tmp_path / "y.png"]
    table.write_text("path,a\nx.png,1\n")
    with pytest.raises(InputError, match="no column 'b', though there is 'a'"):
        inputs.find(table, ("b", "a"), True)
    table.write_text("path,a,b\nx.png,1,2\n")
    with pytest.raises(InputError, match="row 2: b is '2'"):
        inputs.find(table, ("b", "a"), True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": "nowhere"}, "--images .*nowhere: there is no such file or folder"),
        ({"output": "none/out.csv"}, "--output .*no file can be made there"),
        ({"grid": "grid.gif"}, "sheets are PNG files"),
        ({"workdir": "nowhere"}, "no run here"),
        ({"mistakes": "m.png"}, "no true labels are known"),
    ],
)
def test_refusals_write_nothing(runs, image_folder, tmp_path, changes, message):
    shutil.copytree(image_folder / "dark", tmp_path / "images" / "other")
    values = {"workdir": runs / "one", "images": tmp_path / "images", "output": tmp_path / "out.csv"}
    values |= {key: tmp_path / value for key, value in changes.items()}
    with pytest.raises(InputError, match=message):
        predict.predict(**values)
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_weights_that_changed_are_noticed(runs, tmp_path):
    shutil.copytree(runs / "one", tmp_path / "one")
    shutil.copytree(runs / "second", tmp_path / "second")
    config = tmp_path / "second" / "config.json"
    config.write_text(config.read_text().replace(str(runs / "one"), str(tmp_path / "one")))
    with pytest.raises(InputError, match=r"its weights were .* when it was started"):  # the source has another path now
        vitft_jax.load(tmp_path / "second")


def test_a_sheet_has_a_place_for_every_tile(tmp_path):
    tiles = [
        sheets.Tile(Image.new("L", (40, 20 + i), 100), f"very/long/path/of/an/image/number/{i}.png") for i in range(9)
    ]
    sheets.draw(tmp_path / "a.png", tiles, "nine", columns=4)
    sheets.draw(tmp_path / "b.png", [*tiles, sheets.Tile(None, "$no_math$", False)], "ten", columns=3)
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
        assert a.width / 4 == pytest.approx(b.width / 3, rel=0.01)
        assert b.height > a.height
    assert len(sheets.spread(500)) == sheets.MOST
    assert sheets.spread(500)[-1] == 499
    np.testing.assert_array_equal(sheets.spread(3), [0, 1, 2])
