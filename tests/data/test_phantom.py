import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GroupKFold, KFold
from sklearn.neighbors import KNeighborsClassifier
from tensorflow_datasets.core import writer

from vitft_jax.data import cases, phantom
from vitft_jax.errors import InputError

ROOT = Path(__file__).parents[2]
SMALL = {"source": 4, "target": 3}


@pytest.fixture
def small(monkeypatch):
    """Sets of a few patients and videos."""
    monkeypatch.setattr(cases, "PATIENTS", SMALL)
    monkeypatch.setattr(cases, "VIDEOS", 2)
    monkeypatch.setattr(cases, "FRAMES", 3)
    cases.cases.cache_clear()
    yield
    cases.cases.cache_clear()


@pytest.mark.parametrize("config", ["source", "target"])
def test_patients_and_classes(config):
    found = cases.cases(config)
    groups = {case.group for case in found}
    assert len(groups) == cases.PATIENTS[config]
    assert len({case.name for case in found}) == len(found)
    per_patient = [sum(case.group == group for case in found) for group in sorted(groups)[:90]]
    assert set(per_patient) == {1, 2, 3}
    shares = np.bincount([case.labels[0] for case in found]) / len(found)
    np.testing.assert_allclose(shares, 1 / 3, atol=0.03)  # patients are balanced; images within their random numbers
    for group in sorted(groups)[:30]:
        assert len({case.labels for case in found if case.group == group}) == 1


def test_videos():
    found = cases.cases("video")
    assert len(found) == cases.VIDEOS * cases.FRAMES
    assert len({case.name for case in found}) == len(found)
    shares = np.mean([case.labels for case in found], axis=0)
    assert (shares > 0.1).all()
    assert (shares < 0.6).all()
    assert len({case.labels for case in found}) >= 6  # labels occur together
    for video in {case.group for case in found}:
        assert len({case.labels[2] for case in found if case.group == video}) == 1


@pytest.mark.parametrize("config", ["source", "target", "video"])
def test_an_image_depends_on_its_number_alone(config):
    forth = [cases.png(config, index) for index in (0, 7, 8)]
    back = [cases.png(config, index) for index in (8, 7, 0)]
    assert forth == back[::-1]
    assert len(set(forth)) == 3


def test_domains_differ_in_what_a_scanner_changes():
    source = np.stack([cases.image("source", i) for i in range(12)]).astype(float)
    target = np.stack([cases.image("target", i) for i in range(12)]).astype(float)
    assert (source[:, :8, :4] > 0).mean() > 0.9  # a linear probe fills the image
    assert not target[:, :8, :4].any()  # a sector does not


def frames():
    """Small versions (n, 256) of four frames of each video, labels and videos."""
    chosen = [i for i, case in enumerate(cases.cases("video")) if case.position % 3 == 0 and case.patient < 30]
    tiny = [Image.fromarray(cases.image("video", i)).resize((16, 16), Image.Resampling.BOX) for i in chosen]
    found = [cases.cases("video")[i] for i in chosen]
    return np.stack([np.asarray(t, float).ravel() for t in tiny]), found


def test_frames_of_a_video_are_alike_so_that_a_random_split_leaks():
    pixels, found = frames()
    videos = np.array([case.patient for case in found])
    good = np.array([case.labels[0] == 0 for case in found])
    distance = np.linalg.norm(pixels[:, None] - pixels[None], axis=-1)
    same = (videos[:, None] == videos) & ~np.eye(len(videos), dtype=bool) & good & good[:, None]
    other = (videos[:, None] != videos) & good & good[:, None]
    assert np.median(distance[same]) < 0.6 * np.median(distance[other])

    labels = np.array([case.labels[2] for case in found])
    accuracy = {}
    for name, folds in (("random", KFold(4, shuffle=True, random_state=0)), ("by video", GroupKFold(4))):
        guess = np.empty_like(labels)
        for train, test in folds.split(pixels, labels, videos if name == "by video" else None):
            guess[test] = KNeighborsClassifier(1).fit(pixels[train], labels[train]).predict(pixels[test])
        accuracy[name] = accuracy_score(labels, guess)
    print(accuracy)
    assert accuracy["random"] > accuracy["by video"] + 0.1, accuracy


@pytest.mark.parametrize("config", ["source", "video"])
def test_round_trip(config, small, tmp_path):
    builder = phantom.prepare(config, tmp_path)
    source = builder.as_data_source(phantom.SPLIT)
    expected = cases.cases(config)
    assert len(source) == len(expected)
    keys = cases.LABELS if config == "video" else ("label",)
    for i, (example, case) in enumerate(zip(source, expected, strict=True)):
        assert (example["group"].decode(), example["name"].decode()) == (case.group, case.name)
        assert tuple(int(example[key]) for key in keys) == case.labels
        np.testing.assert_array_equal(example["image"][..., 0], cases.image(config, i))


def test_it_is_made_once(small, tmp_path, monkeypatch):
    phantom.prepare("target", tmp_path)
    monkeypatch.setattr(cases, "png", None)
    assert len(phantom.prepare("target", tmp_path).as_data_source(phantom.SPLIT)) == len(cases.cases("target"))
    place = tmp_path / "phantom" / "target"
    assert [path.name for path in place.iterdir()] == [str(phantom.Phantom.VERSION)]
    assert [path.name for path in tmp_path.iterdir()] == ["phantom"]


def test_no_tensorflow_no_network_and_nothing_printed(tmp_path):
    code = f"""
import socket, sys
def refuse(*_, **__): raise AssertionError("network")
socket.socket.connect = socket.getaddrinfo = refuse
from pathlib import Path
from vitft_jax.data import cases
cases.VIDEOS = cases.FRAMES = 2
from vitft_jax.data.phantom import SPLIT, prepare
assert len(list(prepare("video", Path({str(tmp_path)!r})).as_data_source(SPLIT))) == 4
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def damage_cut(place):
    (record,) = place.glob("*array_record*")
    record.write_bytes(record.read_bytes()[:-1000])


def damage_missing(place):
    next(place.glob("*array_record*")).unlink()


def damage_empty(place):
    for file in place.iterdir():
        file.unlink()


@pytest.mark.parametrize("damage", [damage_cut, damage_missing, damage_empty])
def test_what_is_not_whole_is_not_taken_for_whole(damage, small, tmp_path):
    phantom.prepare("target", tmp_path)
    place = tmp_path / "phantom" / "target" / str(phantom.Phantom.VERSION)
    damage(place)
    with pytest.raises(InputError, match=r"not whole .*Delete that folder"):
        phantom.prepare("target", tmp_path)


def test_a_set_of_another_size_is_not_taken_for_this_one(small, tmp_path, monkeypatch):
    phantom.prepare("target", tmp_path)
    monkeypatch.setattr(cases, "PATIENTS", {"target": 6})
    cases.cases.cache_clear()
    with pytest.raises(InputError, match="not whole"):
        phantom.prepare("target", tmp_path)


def test_an_interrupted_making_is_forgotten(small, tmp_path, monkeypatch):
    def stop(config, index):
        if index == 3:
            raise KeyboardInterrupt
        return png(config, index)

    png = cases.png
    with monkeypatch.context() as patch:
        patch.setattr(cases, "png", stop)
        with pytest.raises(KeyboardInterrupt):
            phantom.prepare("target", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    phantom.prepare("target", tmp_path / "new")


def test_a_full_disk_leaves_nothing_behind(small, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer.Writer, "finalize", full)
    with pytest.raises(InputError, match=r"No space left on device.*choose another folder"):
        phantom.prepare("target", tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made(small, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="could not be written"):
        phantom.prepare("target", tmp_path / "file" / "data")


def test_unknown_set(tmp_path):
    with pytest.raises(InputError, match="did you mean 'target'"):
        phantom.prepare("targt", tmp_path)
