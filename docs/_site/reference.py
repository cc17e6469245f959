"""Reference pages that are generated from the code: command line, config keys, quantizers, laws.

Each function returns one page as Markdown. Nothing here needs mkdocs, so a test can read the pages without building the site.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import typer

import questctl
from questctl import config
from questctl.analysis.laws import LAWS
from questctl.cli.app import PANELS, app
from questctl.config.presets import PRESETS
from questctl.quant.methods import METHODS
from questctl.quant.spec import KINDS, TITLES

INTRODUCTION = """# Command line

Every command that reports has `--json`. Results are on standard output, progress and messages on standard error. `--help` and
usage errors load neither torch nor pandas.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | an error |
| 2 | wrong usage or wrong input; nothing was written |
| 3 | a sweep ended with failed cells |
| 4 | training diverged |
| 5 | an optional package is not installed; the message has the `pip` line |
| 75 | stopped by a signal after a checkpoint was written; the same command continues |
| 130 | stopped by Ctrl-C |
| 141 | whoever reads the output has closed it, as `head` does |
"""


def cell(text: str) -> str:
    """Text for one cell of a table: one line, without column separators or HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines) + "\n"


def option_row(option: Any, context: Any) -> tuple[str, str]:
    """How an option is written, and its help with the default where the help of the command shows one."""
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    value = "" if option.is_flag else f" `{option.metavar or option.display_type(context)}`"
    return names + value, cell(option.help or "")


def commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Each command below a group, as (full name, command), in the order of the help."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield f"{path} {name}", command
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def command_line() -> str:
    """`reference/cli.md`: each command with its arguments and options."""
    text = [INTRODUCTION]
    panel = ""
    for name, command in commands(typer.main.get_command(app), "questctl"):
        heading = PANELS.get(name.split()[1], panel)
        if heading != panel:
            panel = heading
            text.append(f"## {panel}\n")
        text.append(f"### `{name}`\n\n{(command.help or '').strip()}\n")
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
        if not hasattr(command, "commands"):
            words = [f"[{a.display_name_raw}]" if not a.required else a.display_name_raw for a in arguments]
            text.append(f"```text\n{' '.join([name, '[OPTIONS]', *words])}\n```\n")
        if arguments:
            text.append(table(("argument", ""), [(f"`{a.display_name_raw}`", cell(a.help or "")) for a in arguments]))
        if options:
            text.append(table(("option", ""), [option_row(o, command.context_class(command)) for o in options]))
    return "\n".join(text)


def config_keys() -> str:
    """`reference/config.md`: each key with its default and meaning, the shorthands, and the presets."""
    text = [
        "# Config keys\n",
        "These keys can stand in a TOML file (`--config`), in a sweep file, behind `--set`, and in environment variables "
        "(`QUESTCTL_TRAIN__STEPS` for `train.steps`). `questctl config explain` shows where each value of a run comes from.\n",
        "A key marked *execution* does not change what is computed. It stays out of the run's identity, see "
        "[The identity of a run](../concepts/runs.md).\n",
    ]
    for name, info in config.RunConfig.model_fields.items():
        section = info.annotation
        if not (isinstance(section, type) and issubclass(section, config.Section)):
            continue
        text.append(f"## `{name}`\n\n{(section.__doc__ or '').strip()}\n")
        rows = []
        for key, field in section.model_fields.items():
            default = "" if field.is_required() else f"`{default_text(field)}`"
            execution = f"{name}.{key}" in config.execution_keys()
            rows.append(
                (f"`{name}.{key}`", cell(default), cell(field.description or "") + (" (*execution*)" if execution else ""))
            )
        text.append(table(("key", "default", "meaning"), rows))
    text.append("## Shorthands\n\nThey are expanded when the config is resolved and are never stored.\n")
    text.append(table(("key", "meaning"), [(f"`{'.'.join(k)}`", cell(v)) for k, v in config.SHORTHAND.items()]))
    text.append("## Presets\n\n`--preset NAME` sets the size of the model and its recipe.\n")
    text.append(table(("preset", "non-embedding parameters", "keys"), [preset_row(name) for name in PRESETS]))
    return "\n".join(text)


def default_text(field: Any) -> str:
    """A default value as TOML would have it."""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value != "" else '""'


def preset_row(name: str) -> tuple[str, str, str]:
    """One preset: its name, its size and the keys that it sets."""
    resolved = config.resolve([config.Layer("", {("preset",): name})]).config
    keys = config.flatten(PRESETS[name], where=name)
    return (
        f"`{name}`",
        f"{resolved.model.params_non_embedding:,}",
        ", ".join(f"`{'.'.join(k)}` {v}" for k, v in keys.items()),
    )


def quantizers() -> str:
    """`reference/quantizers.md`: the forms of each component, and the named methods."""
    text = [
        "# Quantizer components and methods\n",
        "A quantizer is written as a spec, `grid[-rotation]-scale[-sparsity]-estimator`. "
        "[Quantizers](../concepts/quantizers.md) explains how the components work together.\n",
    ]
    for kind, classes in KINDS.items():
        rows = []
        for component in classes:
            forms = ", ".join(f"`{form}`" for form in component.forms)
            variants = ", ".join(f"`.{variant}`" for variant in component.variants)
            rows.append((forms, variants, cell((component.__doc__ or "").partition("\n\n")[0])))
        text.append(f"## {TITLES[kind].capitalize()}\n\n{table(('written', 'variants', 'meaning'), rows)}")
    text.append("## Methods\n\nA method is a name for two specs, one of the weights and one of the activations.\n")
    rows = []
    for name, method in METHODS.items():
        bits = "4" if "4" in method.bits else method.bits[-1]
        weights, activations = method.specs(bits, 128)
        rows.append((f"`{name}`", cell(method.summary), f"`{weights}`", f"`{activations}`", cell(method.source)))
    text.append(table(("method", "what it does", "weights, for example", "activations", "source"), rows))
    return "\n".join(text)


def laws() -> str:
    """`reference/laws.md`: each law with its equation and source."""
    text = [
        "# Scaling laws\n",
        "`fit-scaling --law NAME` fits one of these; `--law auto` ranks them by what they predict of runs left out. N is the "
        "number of non-embedding parameters, D the number of training tokens, P the bits, L the validation loss. "
        "[Scaling laws and eff](../concepts/laws.md) explains the symbols.\n",
    ]
    rows = [(f"`{name}`", f"`{law.equation}`".replace("|", "\\|"), cell(law.source)) for name, law in LAWS.items()]
    text.append(table(("law", "equation", "source"), rows))
    return "\n".join(text)


GROUP = re.compile(r"^ {4}(\w+) {2,}(.+)$", re.MULTILINE)  # "    Train       train · estimate_run" in questctl's docstring

ROOMS = {  # what else is documented: page → title, one sentence, and the objects
    "quant": (
        "Quantizers",
        "Parse specs, build quantizers, and look at their components.",
        (
            "quant.spec.QuantSpec",
            "quant.quantizer.Quantizer",
            "quant.quantizer.make_quantizer",
            "quant.linear.QuantLinear",
            "quant.modules.ModuleDescription",
            "quant.modules.LayerDescription",
            "quant.components",
            "quant.grids.Grid",
        ),
    ),
    "analysis": (
        "Laws and fits",
        "Fit laws to arrays or tables, without torch.",
        (
            "analysis.points",
            "analysis.laws.Law",
            "analysis.fit",
            "analysis.isoflop",
            "analysis.uncertainty",
            "analysis.planner",
        ),
    ),
    "store": ("Runs on disk", "Read run folders.", ("store.runs",)),
    "errors": ("Errors", "Every error that a user can cause, with its exit code.", ("errors",)),
}


def full_name(call: Any) -> str:
    """Where a function or class is defined: packages re-export names lazily, which mkdocstrings cannot follow."""
    return f"{call.__module__}.{call.__qualname__}"


def groups_of_calls() -> dict[str, list[str]]:
    """Title → names of the public calls, as the docstring of questctl groups them; what it does not list comes last."""
    groups = {title: names.split(" · ") for title, names in GROUP.findall(questctl.__doc__ or "")}
    listed = {name for names in groups.values() for name in names}
    rest = [name for name in questctl.__all__ if name not in listed and not name.startswith("_")]
    return groups | ({"Other": rest} if rest else {})


def public_calls() -> str:
    """`reference/python/index.md`: the names that questctl exports, in the groups of its docstring."""
    places = {title: {n: full_name(getattr(questctl, n)) for n in names} for title, names in groups_of_calls().items()}
    rows = [(title.lower(), ", ".join(f"[`{n}`](#{place})" for n, place in calls.items())) for title, calls in places.items()]
    text = [
        "# Python\n",
        "Everything that a command does is one call. `import questctl` loads neither torch nor pandas; each name loads "
        "what it needs when it is first used.\n",
        table(("to", "call"), rows),
    ]
    for title, calls in places.items():
        text.append(f"## {title}\n")
        text += [f"::: {place}\n    options:\n      heading_level: 3\n" for place in calls.values()]
    return "\n".join(text)


def room_page(name: str) -> str:
    """`reference/python/<room>.md`: the documented objects of one room."""
    title, sentence, objects = ROOMS[name]
    return "\n".join([f"# {title}\n", f"{sentence}\n", *(f"::: questctl.{path}\n" for path in objects)])


PAGES = {
    "reference/cli.md": command_line,
    "reference/config.md": config_keys,
    "reference/quantizers.md": quantizers,
    "reference/laws.md": laws,
    "reference/python/index.md": public_calls,
    **{f"reference/python/{room}.md": partial(room_page, room) for room in ROOMS},
}
