"""How a command ends."""

import subprocess
import sys

import pytest

from mixreorg_fast.errors import UserError, run_command


def stopped_by(error: BaseException):
    def main() -> None:
        raise error

    return main


def test_exit_codes_and_lines(capsys):
    assert run_command(lambda: None) == 0
    assert run_command(lambda: 1) == 1
    assert run_command(stopped_by(UserError("no file\n  here"))) == 2
    assert run_command(stopped_by(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.splitlines() == ["error: no file here", "interrupted"]
    for error in (UserError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            run_command(stopped_by(error), debug=True)


def test_ranks_but_the_first_say_nothing(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run_command(stopped_by(UserError("everywhere"))) == 2
    assert capsys.readouterr().err == ""


def test_a_reader_that_has_enough_ends_a_command_quietly():
    command = [sys.executable, "-m", "mixreorg_fast.cli", "config"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.wait() == 141 and process.stderr.read() == b""


def test_another_broken_pipe_is_an_error():
    with pytest.raises(BrokenPipeError):
        run_command(stopped_by(BrokenPipeError()))
