"""README.md, docs/benchmarks.md and docs/results.md say what docs/results says, by scripts/readme.py."""

import json
import re
import shutil

import pytest
import readme

from vitft_jax.errors import InputError

RESULTS = readme.ROOT / "docs" / "results"


@pytest.mark.parametrize("page", readme.PAGES)
def test_pages_are_what_the_files_say(page):
    text = (readme.ROOT / page).read_text()
    assert "<!-- results:" in text
    assert readme.rendered(text, RESULTS) == text, "run python scripts/readme.py"


def test_every_block_stands_on_a_page_once_and_every_marker_is_closed():
    text = "".join((readme.ROOT / page).read_text() for page in readme.PAGES)
    names = re.findall(r"<!-- results:(\w+) -->", text)
    assert sorted(names) == sorted(readme.BLOCKS)
    assert len(names) == text.count("<!-- end -->")


@pytest.fixture
def benchmark(tmp_path):
    """A folder of results: a small benchmark in the place of all (contestants at 10, 20, ... images/s), and a table of runs."""
    shutil.copy(RESULTS / "methods_busi.csv", tmp_path)
    for block in readme.BLOCKS.values():
        for alias, name in block.files.items():
            if name.endswith(".md"):
                (tmp_path / name).write_text("| a |\n|---|\n| 10.0 |\n")
            if not name.endswith(".json"):
                continue
            lines = "\n".join("\n".join(each.lines) for each in readme.BLOCKS.values())
            fields = re.findall(rf"\{{{alias}:\w+ ([^{{}}]+)\}}", lines)
            tasks = {task for task, *_ in map(str.split, fields)}
            who = dict.fromkeys(label for _, *labels in map(str.split, fields) for label in labels)
            rows = [
                {
                    "task": task, "contestant": label, "images_per_second": [10.0 * (i + 1)] * 3, "gflop_per_image": 1.0,
                    "share_of_peak": 0.25, "imported_seconds": 1.0, "first_step_seconds": 2.0, "peak_mib": 100.0,
                }
                for task in tasks
                for i, label in enumerate(who)
            ]  # fmt: skip
            told = {
                "command": "c", "cpu": "2 x X", "python": "3", "model": "m", "size": 224, "versions": {"jax": "1"},
                "peak_gflops": {"float32": 1234.5}, "rows": rows,
            }  # fmt: skip
            (tmp_path / name).write_text(json.dumps(told))
    return tmp_path


@pytest.mark.parametrize("name", readme.BLOCKS)
def test_a_changed_number_changes_the_block(benchmark, name):
    block = readme.BLOCKS[name]
    before = readme.render(block, benchmark)
    assert "{" not in before
    assert len({line.count("|") for line in before.splitlines() if line.startswith("|")}) <= 1
    for file in block.files.values():
        text = (benchmark / file).read_text()
        changed = text.replace(",0.8", ",0.7") if file.endswith(".csv") else text.replace("10.0", "11.0")
        (benchmark / file).write_text(changed)
        assert readme.render(block, benchmark) != before, file
        (benchmark / file).write_text(text)
    assert readme.render(block, benchmark) == before


def test_numbers_are_those_of_the_file(benchmark):
    path = benchmark / "benchmark_vit_b.json"
    told = json.loads(path.read_text())
    for row in told["rows"]:
        row["images_per_second"] = {"ours": [10, 20, 30], "float": [5, 5, 5]}.get(row["contestant"], [1, 1, 1])
    path.write_text(json.dumps(told))
    lines = readme.render(readme.BLOCKS["vit_b"], benchmark).splitlines()
    assert (
        lines[2] == "| ours, int8, a scale per token | 20.0 (10.0 to 30.0) |  | 20.00x (10.00 to 30.00) | 25 % | 100 |"
    )
    assert lines[3] == "| ours, float32 | 5.0 (5.0 to 5.0) | 4.00x (2.00 to 6.00) | 5.00x (5.00 to 5.00) | 25 % | 100 |"
    assert "Matrix peak, GF/s: float32 1,234." in lines[-1]


def test_what_is_not_measured_yet_names_its_command(benchmark):
    (benchmark / "benchmark_skip.json").unlink()
    text = readme.render(readme.BLOCKS["skip"], benchmark)
    assert text == f"Not measured yet: `{readme.command('skip')}`\n"


def test_bad_files_and_names_are_told(benchmark):
    (benchmark / "benchmark_skip.json").write_text("{")
    with pytest.raises(InputError, match=r"benchmark_skip\.json: no file of results"):
        readme.render(readme.BLOCKS["skip"], benchmark)
    with pytest.raises(InputError, match="no skip_9 ours"):
        readme.render(readme.Block({"vit_b": "benchmark_vit_b.json"}, ["{vit_b:speed skip_9 ours}"]), benchmark)
    with pytest.raises(InputError, match=r"results:buzi.*did you mean 'busi'"):
        readme.rendered("<!-- results:buzi -->\n<!-- end -->", benchmark)
