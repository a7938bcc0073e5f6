from pathlib import Path

import pytest
from ml_collections import ConfigDict
from PIL import Image

from vitft_jax.data.sources import load

BUSI = Path(__file__).parents[3] / "shared" / "data" / "busi"


@pytest.mark.skipif(not BUSI.is_dir(), reason=f"the BUSI images are not at {BUSI}")
def test_busi():
    config = ConfigDict({"source": "folder", "path": str(BUSI), "table": "labels.csv", "labels": (), "image_size": 224})
    dataset = load(config, 0)
    assert dataset.classes == ("benign", "malignant", "normal")
    assert len(dataset) == 780
    assert len(set(dataset.groups)) == 658
    parts = {split: dataset.indices(split) for split in ("train", "val", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 546, "val": 78, "test": 156}
    groups = [{dataset.groups[i] for i in part} for part in parts.values()]
    assert sum(map(len, groups)) == 658
    for name in dataset.names:
        with Image.open(BUSI / name) as image:
            assert image.size == (256, 256)
    assert dataset.images[0].mode == "L"  # stored as RGB
