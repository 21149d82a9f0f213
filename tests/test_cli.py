"""The command line: what it prints, its exit status, and one readable line for every error."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import reparam
from reparam import files, sources
from reparam.cli import app

pytest_plugins = ("toy_package",)


def run(*arguments: object, status: int = 0) -> str:
    """Run the command line and return all it printed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result.output


def test_collapse_prints_what_became_of_it_and_writes_the_file(toy: str, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    output = run("collapse", toy, "-o", path)
    assert "convs" in output
    assert "proven" in output
    assert "seconds" in output
    content = files.load_state(path)
    assert content.collapsed
    assert content.source == toy
    assert not any("running_mean" in name for name in content.tensors)


def test_collapse_without_proof_says_so(toy: str) -> None:
    assert "not proven" in run("collapse", toy, "--no-verify")


def test_a_collapsed_file_is_the_network_it_came_from(toy: str, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    run("collapse", toy, "-o", path)
    assert "equal" in run("verify", toy, path)
    assert "equal" in run("verify", path, path)
    run("collapse", path, "-o", tmp_path / "again.pt")
    assert "equal" in run("verify", path, tmp_path / "again.pt")


def test_verify_names_the_first_difference(toy: str, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.manual_seed(0)
    model = sources.create(toy).eval()
    with torch.no_grad():
        model.head.weight[0, 0] += 1e-2
    files.save_model(model, path, source=toy)
    output = run("verify", toy, path, status=1)
    assert "different" in output
    assert "head" in output


def test_explain_lists_folds(toy: str) -> None:
    output = run("explain", toy)
    assert "folds: 1" in output
    assert "before" in output
    everything = run("explain", toy, "--all")
    assert "square" in everything
    assert "point" in everything


def test_trained_weights_are_taken_from_a_file(toy: str, tmp_path: Path) -> None:
    trained = sources.create(toy).eval()
    torch.save(trained.state_dict(), tmp_path / "trained.pt")
    run("collapse", toy, "--weights", tmp_path / "trained.pt", "-o", tmp_path / "net.pt")
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(files.load_model(tmp_path / "net.pt")(x), trained(x))


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("explain", "toy:blok"), 2, "did you mean block"),
        (("explain", "README"), 2, "source:name"),
        (("explain",), 2, "Missing argument"),
        (("bogus",), 2, "No such command"),
        (("collapse", "toy:block", "-o", "net.onnx"), 2, ".safetensors"),
        (("collapse", "toy:block", "-o", "nowhere/net.pt"), 2, "does not exist"),
        (("collapse", "toy:block", "--pretrained"), 1, "no weights here"),
        (("verify", "toy:block", "missing.pt"), 1, "missing.pt: no such file"),
        (("collapse", "net.pt", "--pretrained"), 2, "is a file"),
    ],
)
def test_an_error_is_one_readable_line(toy: str, arguments: tuple[str, ...], status: int, words: str) -> None:
    output = run(*arguments, status=status)
    assert words in " ".join(output.replace("│", " ").split())
    assert "Traceback" not in output


def test_unforeseen_errors_are_one_line_unless_debugging(toy: str) -> None:
    output = run("crash", status=1)
    assert "error: RuntimeError: out of cheese" in output
    result = CliRunner().invoke(app, ["--debug", "crash"])
    assert isinstance(result.exception, RuntimeError)


def test_commands_of_other_packages(toy: str) -> None:
    assert run("hello", "--name", "world") == "hello world\n"
    assert run("group", "inner") == "inside\n"
    help_text = run("--help")
    assert "Say hello" in help_text
    assert "collapse" in help_text


def test_a_broken_command_does_not_break_the_others(toy: str) -> None:
    assert "Not available" in run("--help")
    assert "toy_zoo_that_is_not_there" in run("broken", status=1)


def test_version() -> None:
    assert reparam.__version__ in run("--version")


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "reparam", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("reparam ")


def test_without_its_packages_the_command_line_says_what_to_install() -> None:
    code = "import sys; sys.modules['rich'] = None; from reparam.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'reparam[cli]'" in done.stderr
    assert "Traceback" not in done.stderr
