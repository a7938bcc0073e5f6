import pytest

from vitft_jax import config as configs
from vitft_jax.errors import InputError

FILE = "from vitft_jax.config import default\ndef get_config():\n    c = default()\n    c.lora.rank = 4\n    return c\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return str(path)


def test_overrides_take_the_type_of_the_default(file):
    overrides = [
        "lora.rank=16",
        "train.lr=1",
        "methods=lora,skip",
        "data.path=a=b",
        "train.class_weights=True",
        "lora.rank_pattern=(('attn', 2),)",
        "data.labels=one",
        "skip.layers=3",
        "skip.drop_ratio=0.2,0.5",
        "skip.rejoin=(None, 9)",
    ]
    c = configs.load(file, overrides)
    assert (c.lora.rank, c.train.lr, c.methods, c.data.path) == (16, 1.0, ("lora", "skip"), "a=b")
    assert c.train.class_weights is True
    assert c.lora.rank_pattern == (("attn", 2),)
    assert c.data.labels == ("one",)
    assert (c.skip.layers, c.skip.drop_ratio, c.skip.rejoin) == ((3,), (0.2, 0.5), (None, 9))
    assert configs.load(file).lora.rank == 4


def test_names_that_look_like_numbers_stay_names(file):
    """Grades such as BI-RADS 2 and 03 are classes."""
    assert configs.load(file, ["data.labels=2,03"]).data.labels == ("2", "03")
    assert configs.load(file, ["data.labels=2"]).data.labels == ("2",)
    assert configs.load(file, ["data.labels=('2','b')"]).data.labels == ("2", "b")
    assert configs.load(file, ["skip.layers=2,3"]).skip.layers == (2, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rnak=3", "unknown config key 'lora.rnak'; did you mean 'lora.rank'?"),
        ("lora=3", "unknown config key 'lora'"),
        ("lora.rank=3.5", "lora.rank='3.5': a whole number is needed, such as 4"),
        ("lora.rank=many", "lora.rank='many': a whole number"),
        ("train.class_weights=1", "True or False is needed"),
        ("lora.rank", "--config.lora.rank=VALUE"),
        ("dtype=float16", "dtype='float16': one of 'float32', 'bfloat16'"),
        ("data.fit=stretch", "data.fit='stretch': one of 'squash', 'crop', 'pad'"),
        ("train.batch_size=0", "train.batch_size=0: at least 1"),
        ("figures.count=61", "figures.count=61: at most 60"),
        (f"figures.names={','.join('a' * 61)}", "figures.names: 61 images; at most 60"),
        ("train.warmup=1.5", "train.warmup=1.5: at least 0 and below 1"),
        ("train.accumulate=3", "does not divide into train.accumulate=3"),
        ("train.epochs=0", "both 0"),
        ("data.labels=(1,2)", "data.labels=(1, 2): 1 is no text; write '1'"),
        ("train.focal_gamma=-1.0", "train.focal_gamma=-1.0: at least 0"),
        ("train.thresholds=best", "train.thresholds='best': one of 'f1', 'youden', 'half'"),
    ],
)
def test_bad_overrides_are_refused_by_key(file, override, message):
    with pytest.raises(InputError) as error:
        configs.load(file, [override])
    assert message in str(error.value)


def test_one_correction_for_rare_classes_at_a_time(file):
    with pytest.raises(InputError, match=r"train.class_weights and train.balanced both"):
        configs.load(file, ["train.class_weights=True", "train.balanced=True"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "get_config"),
        (FILE.replace("lora.rank", "lora.rnak"), "rnak"),
        (FILE.replace("c.lora.rank = 4", "c.loar = 4"), "loar"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        configs.load(str(path))


def test_missing_file():
    with pytest.raises(InputError, match=r"nowhere.py: no such file"):
        configs.load("nowhere.py")


def test_json_round_trip_keeps_types(file):
    c = configs.load(file, ["lora.rank_pattern=(('attn', 2),)", "methods=lora", "skip.rejoin=(None, 9)"])
    again = configs.from_json(configs.to_json(c))
    assert again == c
    assert again.lora.rank_pattern == (("attn", 2),)
    with pytest.raises(InputError, match=r"unknown key 'train.lrr'; did you mean 'train.lr'"):
        configs.from_json(configs.to_json(c).replace('"lr"', '"lrr"'))


def test_differences_name_key_and_both_values(file):
    assert configs.differences(configs.load(file), configs.load(file, ["seed=3"])) == ["seed: 0 there, 3 here"]


@pytest.mark.parametrize("name", ["lora", "adalora", "dora", "pissa", "probe", "full", "skip"])
def test_shipped_configs_load(name, pytestconfig):
    configs.load(str(pytestconfig.rootpath / "configs" / f"{name}.py"))


def test_every_key_is_read_somewhere(pytestconfig):
    """A key that nothing reads is a promise that nothing keeps."""
    source = "".join(
        p.read_text() for p in (pytestconfig.rootpath / "vitft_jax").rglob("*.py") if p.name != "config.py"
    )
    c = configs.default()
    leaves = [leaf for group in c.values() if isinstance(group, configs.Config) for leaf in group]
    leaves += [key for key, value in c.items() if not isinstance(value, configs.Config)]
    unread = [leaf for leaf in leaves if f".{leaf}" not in source and f'"{leaf}"' not in source]
    assert unread == []
