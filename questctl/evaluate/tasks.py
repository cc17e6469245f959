"""Downstream tasks: the accuracy of a model, with its weights packed or not, on tasks of lm-eval or on local files.

    `--tasks cloze.jsonl`        lines with a context, choices and the index of the right one (or HellaSwag's field names)
    `--tasks task.yaml`          a task in lm-eval's own format that reads local files
    `--tasks hf:hellaswag`       a registered task of lm-eval; its data are fetched from the Hugging Face Hub

A choice is scored by the log-likelihood of its tokens after the context, log p = Σ ln p(xₜ | x<ₜ). `acc` counts how often the
right choice has the largest score, `acc_norm` the largest score per character (lm-eval's definitions, arXiv 2405.14782). A text
that is longer than the run's sequences loses its beginning. Batches consist of rows of the same length instead of padded rows,
because quantizers that measure their input would measure the padding, too.
"""

from __future__ import annotations

import difflib
import json
from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.tokenizers import Tokenizer
from ..errors import DataError, MissingDependency, UsageError
from ..models.llama import Llama
from ..system import temporary_environment
from ..words import few
from .generate import generate

if TYPE_CHECKING:
    from lm_eval.api.model import LM

HUB = "hf:"
FIELDS = {  # part of a question → names of its field; the first that a file has is used
    "context": ("context", "query", "ctx", "question"),
    "choices": ("choices", "endings"),
    "answer": ("answer", "gold", "label"),
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
BATCH = 32  # sequences per batch
LONGEST_ANSWER = 256  # tokens of a generated answer, if the task sets no limit


def evaluate(
    model: Llama, tokenizer: Tokenizer, tasks: Sequence[str], *, max_length: int, limit: int | None = None, shots: int = 0
) -> dict[str, dict[str, float]]:
    """The metrics of a model on tasks: task → metric → value, with lm-eval's names (without the suffix of its filter).

    `max_length` is the longest sequence in tokens, `limit` the largest number of examples per task, and `shots` the number of
    examples in each prompt. Raises MissingDependency without lm-eval, UsageError for an unknown task, and DataError for a file
    that is missing or malformed.
    """
    require_lm_eval()
    configs = [load(name) for name in tasks]  # reads the files before the slow import below
    hub = any(name.startswith(HUB) for name in tasks)
    with temporary_environment({} if hub else OFFLINE):
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_defaults=hub)
        for task in configs:
            if isinstance(task, str) and task not in manager.all_tasks:
                near = difflib.get_close_matches(task, manager.all_tasks, n=3)
                raise UsageError(f"--tasks: lm-eval has no task '{task}'{'; similar: ' + ', '.join(near) if near else ''}.")
        outcome = simple_evaluate(
            adapter(model, tokenizer, max_length),
            tasks=configs,
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            task_manager=manager,
            verbosity="ERROR",
        )
    assert outcome is not None
    return {task: _metrics(values) for task, values in outcome["results"].items()}


def require_lm_eval() -> None:
    """Raise MissingDependency if lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise MissingDependency("--tasks: lm-eval is not installed; pip install 'questctl[eval]'.")


# --- tasks ------------------------------------------------------------------------------------------------------------


def load(name: str) -> str | dict[str, Any]:
    """The task that a value of `--tasks` names: the name of a registered task, or lm-eval's config of a task in a local file.

    Raises UsageError if `name` is neither `hf:` nor a file of a known suffix, and DataError, which names the file, line and
    field, if the file is missing or malformed.
    """
    if name.startswith(HUB):
        return name.removeprefix(HUB)
    path = Path(name)
    if path.suffix not in (".json", ".jsonl", ".yaml", ".yml"):
        raise UsageError(f"--tasks: '{name}' is not a .jsonl, .json or .yaml file; registered tasks are written hf:{name}.")
    if not path.is_file():
        raise DataError(f"--tasks: {path} is not a file.")
    if path.suffix in (".yaml", ".yml"):
        from lm_eval.utils import load_yaml_config

        config: dict[str, Any] = load_yaml_config(str(path))
        return config
    return cloze(path)


def cloze(path: Path) -> dict[str, Any]:
    """The lm-eval config of a JSON or JSON-lines file of multiple-choice questions. Raises DataError as `load`."""
    text = path.read_text(encoding="utf-8")
    lines: list[tuple[str, Any]] = []
    try:
        if path.suffix == ".json":
            lines = [(f"entry {i}", row) for i, row in enumerate(json.loads(text), 1)]
        else:
            lines = [(f"line {i}", json.loads(line)) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    except json.JSONDecodeError as e:
        where = f"line {len(lines) + e.lineno}" if path.suffix == ".json" else _broken_line(text)
        raise DataError(f"{path}, {where}: is not JSON: {e.msg}.") from e
    if not lines:
        raise DataError(f"{path}: holds no questions.")
    names = {
        kind: next((f for f in aliases if isinstance(lines[0][1], dict) and f in lines[0][1]), None)
        for kind, aliases in FIELDS.items()
    }
    for kind, name in names.items():
        if name is None:
            fields = few(lines[0][1]) if isinstance(lines[0][1], dict) else "no fields"
            raise DataError(f"{path}, {lines[0][0]}: has no {kind} ({' or '.join(FIELDS[kind])}); it has {fields}.")
    for where, row in lines:
        choices, answer = (row.get(names[k]) if isinstance(row, dict) else None for k in ("choices", "answer"))
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise DataError(f"{path}, {where}: '{names['choices']}' is not a list of two or more texts.")
        if not str(answer).isdecimal() or int(str(answer)) >= len(choices):
            field = f"'{names['answer']}' is {answer!r}"
            raise DataError(f"{path}, {where}: {field}, not the index of one of {len(choices)} choices.")
    return {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.absolute())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{" + str(names["context"]) + "}}",
        "doc_to_target": "{{" + str(names["answer"]) + "}}",
        "doc_to_choice": "{{" + str(names["choices"]) + "}}",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
        "metadata": {"version": 1.0},
    }


def _broken_line(text: str) -> str:
    for i, line in enumerate(text.splitlines(), 1):
        try:
            json.loads(line or "0")
        except json.JSONDecodeError:
            return f"line {i}"
    raise AssertionError("a line is broken")


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """The values that are numbers, with names such as `acc` for lm-eval's `acc,none`; aliases and `N/A` are left out."""
    return {k.partition(",")[0]: float(v) for k, v in values.items() if isinstance(v, int | float)}


# --- model ------------------------------------------------------------------------------------------------------------


def adapter(model: Llama, tokenizer: Tokenizer, max_length: int) -> LM:
    """Wrap `model` in lm-eval's interface, which asks for log-likelihoods and generated text."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class QuestLM(TemplateLM):
        """The interface. TemplateLM splits pairs into tokens as lm-eval does for every causal model."""

        @property
        def eot_token_id(self) -> int:
            return tokenizer.end

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return [int(i) for i in tokenizer.encode(string)]

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            return loglikelihoods(model, [(context, continuation) for _, context, continuation in requests], max_length)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            sums = []
            for request in requests:
                windows = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, max_length, 1)
                pairs = [make_disjoint_window(window) for window in windows]
                sums.append(sum(logp for logp, _ in loglikelihoods(model, pairs, max_length)))
            return sums

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [continued(model, tokenizer, *request.args, max_length=max_length) for request in requests]

    return QuestLM()


@torch.no_grad()
def loglikelihoods(model: Llama, pairs: Sequence[tuple[list[int], list[int]]], max_length: int) -> list[tuple[float, bool]]:
    """For each (context ids, continuation ids): log p of the continuation in nats, and whether it is the greedy continuation.

    Pairs longer than `max_length` + 1 ids lose their beginning.
    """
    device = next(model.parameters()).device
    rows = [(context + continuation)[-(max_length + 1) :] for context, continuation in pairs]
    by_length: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        by_length[len(row)].append(i)
    out: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for members in by_length.values():
        for part in (members[i : i + BATCH] for i in range(0, len(members), BATCH)):
            tokens = torch.tensor([rows[i] for i in part], dtype=torch.int64, device=device)
            logp = model(tokens[:, :-1]).float().log_softmax(-1)
            best = logp.argmax(-1)
            each = logp.gather(-1, tokens[:, 1:, None])[..., 0].double()
            for at, i in enumerate(part):
                count = min(len(pairs[i][1]), tokens.shape[1] - 1)
                if count:
                    out[i] = float(each[at, -count:].sum()), bool((best[at, -count:] == tokens[at, -count:]).all())
    return out


def continued(model: Llama, tokenizer: Tokenizer, context: str, until: dict[str, Any], *, max_length: int) -> str:
    """The greedy continuation of `context`, up to the first of the texts `until["until"]`; other keys as in lm-eval."""
    stops = [until["until"]] if isinstance(until.get("until"), str) else list(until.get("until") or ())
    count = min(int(until.get("max_gen_toks", LONGEST_ANSWER)), max_length - 1)
    prompt = [int(i) for i in tokenizer.encode(context)][-(max_length - count) :] or [tokenizer.end]
    ids: list[int] = []
    for token in generate(model, prompt, max_tokens=count, end=tokenizer.end):
        ids.append(token)
        text = tokenizer.decode(ids)
        if any(stop in text for stop in stops):
            break
    text = tokenizer.decode(ids)
    return min((text.partition(stop)[0] for stop in stops if stop in text), key=len, default=text)
