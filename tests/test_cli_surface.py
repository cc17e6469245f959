"""The public commands and options, listed, so that the surface grows only on purpose; what reports can also say it in JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer
from command_line import output, run_cli
from helpers import slow_but

from questctl.cli.app import app
from questctl.config import layers

CONFIG = "--bits --config --data --init --lr --preset --quant --seed --set --steps --teacher --tokens-per-param"
TABLE = "--best-of --bits-of --cluster --keep-failed --last --loss-unit --map --skip-bad --weights --where"
SURFACE = {
    "train": f"{CONFIG} --branch-from --cooldown --dry-run --json --nproc --quiet --runs --track",
    "sweep": "--account --address --constraint --container --cpus --dry-run --emit --force --gpus --jobs --jobs-per-gpu --json "
    "--launcher --modules --partition --quiet --retry --runs --set --time --track --wait",
    "worker": "--force --jobs --jobs-per-gpu --json --leave --quiet --runs --set --threads",
    "simulate": "--cluster --failures --force --json --plot --preemptions --price --retry --runs --seed --set --slow",
    "study": "--details --dry-run --jobs --json --out --quiet --retry --runs --scale --set",
    "fit-scaling": "--bootstrap --details --evaluate --fix --intervals --json --law --objective --out --residuals --runs "
    f"--schemes {TABLE}",
    "report": f"--bench --bootstrap --figures --json --law --most-runs --open --out --runs --title {TABLE}",
    "plan": "--artifact --bits --bootstrap --compressed --details --embedding --fix --flops --goal --inference-tokens --json "
    "--kv --law --lengths --map --max-flops --memory --next-runs --objective --out --residuals --runs --seconds --set --sizes "
    f"--speed --tokens-per-param --unique-tokens --untrained --versus --vocab {TABLE}",
    "predict": "--D --N --bootstrap --cells --details --fix --json --law --objective --residuals --runs --scheme "
    f"--share --unique-tokens {TABLE}",
    "forecast": "--N --given --json --law --loss --map --optimize --out --run --runs --schedule --scheme --steps",
    "fit-knobs": "--json --map --runs --where",
    "eval": "--average --data --json --limit --packed --part --product --reference --runs --shots --tasks --tokens --watch",
    "generate": "--average --json --max-tokens --packed --product --runs --seed --temperature --top-k",
    "quantize": "--activations --bits --calibration-tokens --config --damping --json --method --quant --runs",
    "probe": "--activations --batches --bits --json --out --quant --runs --sequences --steps",
    "allocate": "--activations --bits --json --method --out --runs --sensitivity --specs --tokens --words",
    "export": "--average --dtype --format --json --out --runs --tokens",
    "bench": "--bits --check-only --compare --compile-only --config --csv --decode --json --m --model --plot --prefill "
    "--preset --quant --seconds --set --threads --train-step",
    "demo": "--dry-run --jobs --json --out --quiet --runs --set",
    "doctor": "--all --json --runs --train",
    "runs ls": "--json --runs --sort --state",
    "runs show": "--json --runs",
    "runs compare": "--json --runs",
    "runs health": "--collapse --json --runs",
    "runs import": f"--data-hash --force --json --name --runs {TABLE}",
    "runs archive": "--json --keep --runs --to",
    "runs restore": "--json --runs",
    "runs sync": "--json --pull --push --runs",
    "runs push": "--json --runs --to",
    "runs watch": "--interval --json --runs",
    "runs rm": "--json --runs --state --yes",
    "data prepare": "--dedup --force --json --max-tokens --out --skip-bad --tokenizer --val-fraction",
    "data info": "--dedup --json --tokenizer --val-fraction",
    "config show": f"{CONFIG} --json",
    "config explain": f"{CONFIG} --json",
    "config presets": "--json",
}


def walk(command: Any, name: tuple[str, ...] = ()) -> Iterator[tuple[str, set[str]]]:
    if hasattr(command, "commands"):
        for word, child in command.commands.items():
            yield from walk(child, (*name, word))
    else:
        yield " ".join(name), {o for p in command.params for o in p.opts if o.startswith("--")} - {"--help"}


def test_the_surface_is_what_is_listed():
    assert dict(walk(typer.main.get_command(app))) == {name: set(options.split()) for name, options in SURFACE.items()}


def test_every_command_reports_in_json():
    assert [name for name, options in SURFACE.items() if "--json" not in options.split()] == []


def test_a_variable_of_another_program_stops_no_command(tmp_path, monkeypatch):
    monkeypatch.setenv("QUESTCTL_HOME", str(tmp_path))
    for words in (("runs", "ls"), ("config", "presets"), ("data", "info", "pystdlib"), ("sweep", "--help")):
        layers._refuse_or_warn.cache_clear()
        where = ("--runs", tmp_path) if words == ("runs", "ls") else ()
        assert "QUESTCTL_HOME" not in run_cli(*words, *where).stderr  # it takes no config
    shown = run_cli("config", "show", "--json")
    assert shown.stderr.startswith("warning: QUESTCTL_HOME: names no key and is ignored; the nearest variable is QUESTCTL_")
    assert shown.stderr.count("QUESTCTL_HOME") == 1
    assert "QUESTCTL_HOME" not in run_cli("config", "show", "--json").stderr  # once per process
    monkeypatch.delenv("QUESTCTL_HOME")
    assert output("config", "show", "--json") == shown.stdout


@pytest.mark.parametrize("words", [("runs", "ls"), ("config", "presets")])
def test_a_mistyped_variable_stops_only_commands_that_take_a_config(tmp_path, monkeypatch, words):
    monkeypatch.setenv("QUESTCTL_TRAIN_STEPS", "3")
    assert "QUESTCTL" not in run_cli(*words, *(("--runs", tmp_path) if words[0] == "runs" else ())).stderr
    assert "did you mean QUESTCTL_TRAIN__STEPS?" in output("config", "show", code=2)


def test_no_help_text_has_brackets_which_the_markup_would_swallow():
    def texts(command: Any) -> Iterator[str]:
        yield command.help or ""
        yield from (getattr(p, "help", None) or "" for p in command.params)
        for child in getattr(command, "commands", {}).values():
            yield from texts(child)

    assert [text for text in texts(typer.main.get_command(app)) if "[" in text] == []


@pytest.mark.parametrize("columns", slow_but([80, 120], [80]))
def test_help_breaks_between_words_and_shows_no_types_of_flags(columns):
    def commands(command: Any, name: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
        yield name, command
        for word, child in getattr(command, "commands", {}).items():
            yield from commands(child, (*name, word))

    for name, command in commands(typer.main.get_command(app)):
        text = run_cli(*name, "--help", columns=columns).stdout
        shown = set(text.replace("│", " ").split())
        said = [command.help or "", *(getattr(p, "help", None) or "" for p in command.params)]
        broken = [word for line in said for word in line.split() if word not in shown]
        assert broken == [], (name, broken)
        assert "<bool>" not in text
        assert "list[" not in text
        assert max(map(len, text.splitlines())) <= columns


def test_paragraphs_of_help_fill_the_line():
    lines = [line.strip() for line in run_cli("train", "--help", columns=80).stdout.splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("The run's name says"))
    assert min(map(len, lines[first : first + 3])) > 70
