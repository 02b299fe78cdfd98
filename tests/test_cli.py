"""Every command reports errors and interruptions alike."""

import argparse

import pytest

from dspark.cli import run_main


def raising(error):
    def work(options):
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "status", "line"),
    [
        (lambda options: None, 0, ""),
        (lambda options: 1, 1, ""),
        (raising(ValueError("n is 0:\nchoose 1")), 2, "dspark.tool: n is 0: choose 1\n"),
        (raising(OSError("disk full")), 2, "dspark.tool: disk full\n"),
        (raising(KeyboardInterrupt()), 130, "dspark.tool: interrupted; finished prompts are kept, and the same command resumes there\n"),
    ],
)
def test_a_command_ends_with_a_status_and_at_most_one_line_on_stderr(work, status, line, capsys):
    parser = argparse.ArgumentParser(prog="python -m dspark.tool")
    assert run_main(parser, work, [], kept="finished prompts") == status
    assert capsys.readouterr().err == line


def test_an_interrupted_command_that_keeps_nothing_does_not_promise_to_resume(capsys):
    run_main(argparse.ArgumentParser(prog="python -m dspark.tool"), raising(KeyboardInterrupt()), [])
    assert capsys.readouterr().err == "dspark.tool: interrupted\n"
