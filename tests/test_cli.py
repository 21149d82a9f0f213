"""The command line: what it prints, its exit status, and one readable line for every error."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import reparam
from reparam import files, sources
from reparam.__main__ import main
from reparam.cli import app
from reparam.recipe import Recipe

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


# ------------------------------------------------------------------------------------------------ expand


def words_of(output: str) -> str:
    """The output without line breaks and frames."""
    return " ".join(output.replace("│", " ").split())


def trained(model: torch.nn.Module) -> torch.nn.Module:
    """The model after a few steps: no branch is silent any more, and statistics have moved."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 8, 8)).square().sum().backward()
        optimizer.step()
    return model.eval()


def test_plan_lists_blocks_costs_and_reasons(toy: str) -> None:
    output = words_of(run("plan", toy, "--block", "acb"))
    assert "square.0 3→4 3x3 acb 116→204→112" in output
    assert "1 of 2 convolutions get a block" in output
    assert "1 a kernel of one tap" in output
    assert "multiply-adds for 3x64x64" in output
    assert "multiply-adds a pixel" not in output
    assert "point" not in output.partition("left alone")[0]
    everything = words_of(run("plan", toy, "--block", "acb", "--all"))
    assert "point.0 3→4 1x1 a kernel of one tap" in everything


def test_plan_names_options_and_mappings_as_they_are_written(toy: str) -> None:
    output = words_of(
        run(
            "plan", toy, "-b", "point=mobileone:n=2", "-b", "acb:gamma=1/3,bn=after", "--where", "*", "--form", "online"
        )
    )
    assert "square.0 3→4 3x3 acb:gamma=0.333,bn=after, online" in output
    assert "point.0 3→4 1x1 mobileone:n=2, online" in output


def test_plan_without_an_input_counts_a_pixel(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(model: torch.nn.Module) -> None:
        raise reparam.ReparamError("no input shape could be guessed")

    monkeypatch.setattr(reparam, "guess_inputs", unknown)
    assert "multiply-adds a pixel" in words_of(run("plan", toy, "--block", "acb"))


def test_filters_choose_layers(toy: str) -> None:
    assert "1 of 2" in run("plan", toy, "-b", "acb", "--kernel", "3", "--no-depthwise")
    assert "0 of 2" in run("plan", toy, "-b", "acb", "--kernel", "5")
    assert "0 of 2" in run("plan", toy, "-b", "acb", "--depthwise")
    assert "0 of 2" in run("plan", toy, "-b", "acb", "--where", "point")


def test_blocks_lists_every_block_with_its_options() -> None:
    output = words_of(run("blocks"))
    for name, info in reparam.blocks().items():
        assert f" {name} " in output
        assert all(f"{option}=" in output for option in info.options)


@pytest.mark.parametrize(
    ("suffix", "form"),
    [
        (".safetensors", "online"),
        (".pt", "branches"),
        pytest.param(".safetensors", "branches", marks=pytest.mark.slow),
        pytest.param(".pt", "online", marks=pytest.mark.slow),
    ],
)
def test_an_expanded_file_goes_the_whole_way(toy: str, tmp_path: Path, suffix: str, form: str) -> None:
    expanded, tuned, deployed = (tmp_path / f"{name}{suffix}" for name in ("expanded", "tuned", "deployed"))
    output = run("expand", toy, "--block", "dbb", "--form", form, "-o", expanded)
    assert "same function: max difference 0.00e+00" in words_of(output)
    assert "equal" in run("verify", toy, expanded)
    assert "folds: 1" in run("explain", expanded)
    model = trained(files.load_model(expanded))
    recipe = files.load_state(expanded).recipe
    assert recipe is not None
    files.save_model(model, tuned, source=toy, expanded=recipe)
    assert "different" in run("verify", toy, tuned, status=1)
    assert "strict=True" in run("collapse", tuned, "-o", deployed)
    assert "equal" in run("verify", tuned, deployed)
    stock = sources.create(toy)
    stock.load_state_dict(files.load_state(deployed).tensors, strict=True)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(stock.eval()(x), model(x))
    run("collapse", deployed, "-o", tmp_path / "folded.pt")
    assert "equal" in run("verify", tuned, tmp_path / "folded.pt")


@pytest.mark.parametrize("how", ["options", "file"])
def test_a_training_script_s_checkpoint_converts_in_one_command(toy: str, tmp_path: Path, how: str) -> None:
    model = trained(reparam.expand(sources.create(toy), "dbb"))
    other = trained(reparam.expand(sources.create(toy), "dbb"))
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 9, "model": other.state_dict(), "ema": state}, tmp_path / "last.pth")
    if how == "options":
        described: tuple[object, ...] = (toy, "--block", "dbb")
    else:
        run("expand", toy, "--block", "dbb", "-o", tmp_path / "start.pt")
        described = (tmp_path / "start.pt",)
    from_file = ("--weights", tmp_path / "last.pth", "-o", tmp_path / "net.pt")
    assert "'model' of" in run("collapse", *described, *from_file)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(files.load_model(tmp_path / "net.pt")(x), other(x))
    run("collapse", *described, *from_file, "--key", "ema")
    torch.testing.assert_close(files.load_model(tmp_path / "net.pt")(x), model(x))


def test_weights_that_say_how_they_were_expanded_need_no_block(toy: str, tmp_path: Path) -> None:
    run("expand", toy, "--block", "acb", "-o", tmp_path / "net.pt")
    assert "strict=True" in run("collapse", toy, "--weights", tmp_path / "net.pt", "-o", tmp_path / "plain.pt")


def test_trained_plain_weights_are_expanded(toy: str, tmp_path: Path) -> None:
    plain = trained(sources.create(toy))
    torch.save(plain.state_dict(), tmp_path / "plain.pt")
    run("expand", toy, "--weights", tmp_path / "plain.pt", "--block", "acb", "-o", tmp_path / "net.pt")
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(files.load_model(tmp_path / "net.pt")(x), plain(x))


def test_the_seed_decides_the_weights(toy: str, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("expand", toy, "--block", "dbb", "--init", "paper", "--seed", seed, "-o", tmp_path / f"{name}.pt")
    a, b, c = (files.load_state(tmp_path / f"{name}.pt").tensors for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["square.0.point.conv.weight"], c["square.0.point.conv.weight"])


def test_an_expansion_that_changes_the_function_fails(
    toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = reparam.Plan.apply

    def wrong(plan: reparam.Plan) -> torch.nn.Module:
        model = right(plan)
        with torch.no_grad():
            model.head.weight.mul_(1.01)
        return model

    monkeypatch.setattr(reparam.Plan, "apply", wrong)
    assert "head" in run("expand", toy, "--block", "acb", "-o", tmp_path / "net.pt", status=1)
    assert not (tmp_path / "net.pt").exists()


@pytest.mark.parametrize(
    ("made", "options", "fix"),
    [
        (Recipe("acb"), ("--block", "dbb"), "--block acb"),
        (Recipe("acb"), (), "--block acb"),
        (Recipe("acb"), ("--block", "acb", "--form", "online"), "--block acb"),
        (Recipe("acb", form="online"), ("--block", "acb"), "--block acb --form online"),
        (
            Recipe("mobileone", where="*"),
            ("--block", "mobileone"),
            "--block mobileone --where 'all'",
        ),
        (Recipe(reparam.Block("acb", bn="after")), ("--block", "acb"), "line0.weight"),
        (Recipe({"square": "acb", "point": "mobileone"}, where="*"), ("--block", "acb"), "PATTERN=BLOCK"),
        (None, ("--block", "acb"), "leave out --block"),
    ],
    ids=str,
)
def test_a_checkpoint_expanded_in_another_way_says_the_fix(
    toy: str, tmp_path: Path, made: Recipe | None, options: tuple[str, ...], fix: str
) -> None:
    model = sources.create(toy)
    torch.save((made.expand(model) if made else model).state_dict(), tmp_path / "trained.pt")
    output = words_of(run("collapse", toy, "--weights", tmp_path / "trained.pt", *options, status=1))
    assert re.search(r"the first is '(square|point)\.0\.", output)
    assert output.endswith(fix) or (not fix.startswith(("--block", "leave")) and fix in output)


def test_a_checkpoint_of_another_network_is_said_to_be_that(toy: str, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    output = words_of(run("collapse", toy, "--weights", tmp_path / "other.pt", "--block", "acb", status=1))
    assert output.endswith("another network")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("plan", "SPEC"), 2, "name a block"),
        (("plan", "SPEC", "-b", "abc"), 2, "did you mean 'acb'"),
        (("plan", "SPEC", "-b", "acb:gama=1"), 2, "no option 'gama'"),
        (("plan", "SPEC", "-b", "acb:bn=aftr"), 1, "'branch' or 'after'"),
        (("plan", "SPEC", "-b", "acb", "--where", "sqare"), 1, "near names: square"),
        (("plan", "SPEC", "-b", "acb", "--init", "papr"), 2, "preserve or paper"),
        (("plan", "EXPANDED", "-b", "acb"), 2, "expanded already, with acb"),
        (("plan", "COLLAPSED", "-b", "acb"), 2, "is collapsed"),
        (("expand", "SPEC", "-b", "acb"), 2, "Missing option"),
        (("expand", "SPEC", "-b", "acb", "-o", "net.onnx"), 2, ".safetensors"),
        (("expand", "SPEC", "-b", "acb", "--kernel", "5", "-o", "OUT"), 1, "no convolution of toy:block gets a block"),
        (("expand", "SPEC", "-b", "acb", "--key", "ema", "-o", "OUT"), 2, "--weights"),
        (("expand", "SPEC", "-b", "acb", "--pretrained", "--weights", "EXPANDED", "-o", "OUT"), 2, "leave one out"),
        (("collapse", "SPEC", "--form", "online"), 2, "name its --block"),
        (("collapse", "SPEC", "--where", "square"), 2, "name its --block"),
        (("collapse", "EXPANDED", "--block", "acb"), 2, "leave out --block"),
        (("collapse", "COLLAPSED", "--weights", "EXPANDED"), 2, "is not a file of `reparam expand`"),
        (("collapse", "SPEC", "--weights", "EXPANDED", "--block", "dbb"), 1, "It fits with --block acb"),
        (("collapse", "SPEC", "--weights", "EXPANDED", "--key", "ema"), 1, "no state dict under 'ema'"),
    ],
)
def test_a_mistake_about_an_expansion_is_one_readable_line(
    toy: str, tmp_path: Path, arguments: tuple[str, ...], status: int, words: str
) -> None:
    places = {"SPEC": toy, **{name: tmp_path / f"{name.lower()}.pt" for name in ("EXPANDED", "COLLAPSED", "OUT")}}
    run("expand", toy, "-b", "acb", "-o", places["EXPANDED"])
    run("collapse", toy, "-o", places["COLLAPSED"])
    output = run(*(places.get(argument, argument) for argument in arguments), status=status)
    assert words in words_of(output)
    assert "Traceback" not in output
    assert not (tmp_path / "out.pt").exists()


# ------------------------------------------------------------------------------------------------ errors and framework


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("explain", "toy:blok"), 2, "did you mean block"),
        (("explain", "README"), 2, "source:name"),
        (("explain",), 2, "Missing argument"),
        (("bogus",), 2, "No such command"),
        (("collapse", "toy:block", "-o", "net.tflite"), 2, ".safetensors"),
        (("collapse", "toy:block", "-o", "nowhere/net.pt"), 2, "does not exist"),
        (("collapse", "toy:block", "--pretrained"), 1, "no weights here"),
        (("verify", "toy:block", "missing.pt"), 1, "missing.pt: no such file"),
        (("collapse", "net.pt", "--pretrained"), 2, "is a file"),
    ],
)
def test_an_error_is_one_readable_line(toy: str, arguments: tuple[str, ...], status: int, words: str) -> None:
    output = run(*arguments, status=status)
    assert words in words_of(output)
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


NET = Path(__file__).parents[1] / "docs" / "net.py"


@pytest.mark.parametrize("command", ["expand", "collapse"])
def test_a_file_is_written_though_nobody_listens_any_more(command: str, tmp_path: Path) -> None:
    """``reparam expand ... | head -1``: the reader of the pipe is gone before the first table."""
    read, write = os.pipe()
    os.close(read)
    options = ["--block", "acb"] if command == "expand" else []
    words = [sys.executable, "-m", "reparam", command, f"{NET}:Net", *options, "-o", str(tmp_path / "net.pt")]
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr.lower()
    assert (tmp_path / "net.pt").is_file()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_tables_are_shown_where_the_output_has_few_characters(encoding: str) -> None:
    words = [sys.executable, "-m", "reparam", "plan", f"{NET}:Net", "--block", "acb"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(words, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"4 of 4 convolutions get a block" in done.stdout


def test_an_interrupt_while_torch_is_imported_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def find_spec(self, name: str, *_: object) -> None:
            if name == "reparam.cli":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "reparam.cli")
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130


def test_messages_say_what_to_do(toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each names the file or option, and the way out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.safetensors").touch()
    (tmp_path / "empty").mkdir()
    assert "it is a folder: name run/best.safetensors" in run("collapse", "run", status=2)
    assert "it is a folder: name a file in it" in run("collapse", "empty", status=2)
    assert f"did you mean {toy}?" in run("collapse", toy.partition(":")[2], status=2)
    assert "run is a folder: name a file in it" in run("inspect", "run", status=1)
    assert "torch.export.load reads it" in run("inspect", "net.pt2", status=1)
    words = " ".join(run("collapse", toy, "-o", "run", status=2).replace("│", " ").split())
    assert "run is a folder: name a file in it, run/net.safetensors" in words
    for command in ("collapse", "convert"):
        words = run(command, toy, "-o", "x.xyz", status=2 if command == "collapse" else 1).replace("│", " ")
        assert "use .safetensors, .pt, .pth, .pt2, .onnx" in " ".join(words.split())


def test_a_file_of_code_that_is_not_here_says_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "net.py").write_text(NET.read_text())
    monkeypatch.chdir(tmp_path)
    run("expand", "net.py:Net", "--block", "acb", "-o", "net.pt")
    monkeypatch.chdir(tmp_path / "one")
    output = " ".join(run("--allow-code", "collapse", "../net.pt", status=1).split())
    assert "../net.pt: its network is code, net.py:Net, and there is no such file in " in output
    assert "proven" in run("collapse", "../net.py:Net", "--weights", "../net.pt")


def test_a_file_that_lacks_little_is_not_said_to_be_of_another_network(toy: str, tmp_path: Path) -> None:
    state = sources.create(toy).state_dict()
    del state["head.bias"]
    torch.save(state, tmp_path / "net.pt")
    output = run("collapse", toy, "--weights", tmp_path / "net.pt", status=1)
    assert "Most names agree: it is incomplete" in " ".join(output.split())
