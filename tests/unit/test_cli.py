"""The command line reads settings and starts parts; bad settings are named."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from mizzen.cli.commands import app


@pytest.mark.parametrize("command", ["serve", "gateway", "operator", "train", "keys"])
def test_help_of_every_part_needs_no_torch(command: str) -> None:
    program = (
        f"import sys; sys.argv = ['mizzen', '{command}', '--help']\n"
        "from mizzen.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--" in done.stdout


def test_a_bad_flag_is_named_with_its_value() -> None:
    result = CliRunner().invoke(app, ["serve", "/nowhere", "--tensor-parallel-size", "many"])
    assert result.exit_code == 2
    assert "tensor" in result.output
    assert "'many'" in result.output


def test_a_key_that_cannot_be_a_secrets_name_is_refused() -> None:
    result = CliRunner().invoke(app, ["keys", "create", "Not A Name"])
    assert result.exit_code == 2
    assert "lower-case" in result.output


def test_a_keys_limits_stand_in_the_secret_it_prints() -> None:
    flags = ["--requests-per-minute", "60", "--tokens-per-minute", "9000", "--concurrency", "4"]
    result = CliRunner().invoke(app, ["keys", "create", "ci", *flags, "--priority", "-2"])
    assert result.exit_code == 0
    assert (
        "    mizzen.dev/limits: requests-per-minute=60 tokens-per-minute=9000 concurrency=4 "
        "priority=-2\n"
    ) in result.stdout
    result = CliRunner().invoke(app, ["keys", "create", "ci", "--concurrency", "0"])
    assert result.exit_code == 2
