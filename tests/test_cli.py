"""Commands as a user types them."""

import re
import subprocess
import sys

import pytest

from vitft_jax import check_data, cli, predict
from vitft_jax.errors import InputError


def command(*arguments):
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("name", ["train", "evaluate", "predict", "check_data"])
def test_help_has_an_example(name):
    result = command(f"vitft_jax.{name}", "--help")
    assert result.returncode == 0
    assert f"example:\n  python -m vitft_jax.{name} --" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.lora.rnak=3"], "error: unknown config key 'lora.rnak'; did you mean 'lora.rank'?"),
        (["--workdri=x"], "error: unknown flag '--workdri=x'; did you mean '--workdir'?"),
        (["--config.data.path=nowhere"], "error: data.path: there is no folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, pytestconfig):
    config = pytestconfig.rootpath / "configs" / "lora.py"
    result = command("vitft_jax.train", "--config", str(config), f"--workdir={tmp_path / 'run'}", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_interrupt_and_bad_input_have_their_own_exit_codes(capsys):
    def fails(error):
        def raises():
            raise error

        with pytest.raises(SystemExit) as stop:
            cli.main(raises)
        return stop.value.code

    assert fails(InputError("what, where, what to do")) == 2
    assert capsys.readouterr().err == "error: what, where, what to do\n"
    assert fails(KeyboardInterrupt()) == 130


def test_every_exit_code_is_explained_in_the_help_and_in_the_docs(pytestconfig):
    page = (pytestconfig.rootpath / "docs" / "faults.md").read_text()
    told = [int(code) for code in re.findall(r"^ +(\d+)  ", cli.EXIT_CODES, re.M)]
    assert told == [int(code) for code in re.findall(r"^\| (\d+) \|", page, re.M)]
    assert len(set(told)) == len(told)
    for command, code in (("predict", predict.SOME_FAILED), ("check_data", check_data.PROBLEMS_FOUND)):
        assert re.search(rf"^ +{code}  {command}: ", cli.EXIT_CODES, re.M)
        assert f"| {code} | `{command}`: " in page
