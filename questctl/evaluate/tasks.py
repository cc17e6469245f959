"""Known tasks through lm-eval: accuracy of a model, in training form or packed, on the harness's tasks or on local files.

    `--tasks cloze.jsonl`        lines with a context, choices and the index of the right one (HellaSwag's field names too)
    `--tasks task.yaml`          a task of lm-eval's own format that reads local files
    `--tasks hf:hellaswag`       a registered task; its data come from the hub, which nothing but `hf:` reaches

A choice is scored by the log-likelihood of its tokens after the context, log p = Σ ln p(xₜ | x<ₜ); `acc` takes the largest,
`acc_norm` the largest per character (lm-eval's definitions, arXiv 2405.14782). A text longer than the run's sequences loses its
beginning. Nothing is padded: rows of one batch have one length, so that no quantizer sees what is not text.
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
from .generate import generate

if TYPE_CHECKING:
    from lm_eval.api.model import LM

HUB = "hf:"
FIELDS = {  # what a question has → how files call it
    "context": ("context", "query", "ctx", "question"),
    "choices": ("choices", "endings"),
    "answer": ("answer", "gold", "label"),
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
BATCH = 32  # sequences of one length that go through the model together
LONGEST_ANSWER = 256  # tokens of a generated answer, where the task does not say


def evaluate(
    model: Llama, tokenizer: Tokenizer, tasks: Sequence[str], *, max_length: int, limit: int | None = None, shots: int = 0
) -> dict[str, dict[str, float]]:
    """task → metric → value, as lm-eval names them without its filter suffix; `limit` examples of each at the most.

    Raises MissingDependency without lm-eval, UsageError for an unknown task, DataError for a file that is none.
    """
    require_lm_eval()
    local = [load(word) for word in tasks]  # files are read before anything slow happens
    hub = any(word.startswith(HUB) for word in tasks)
    with temporary_environment({} if hub else OFFLINE):
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_defaults=hub)
        for task in local:
            if isinstance(task, str) and task not in manager.all_tasks:
                near = difflib.get_close_matches(task, manager.all_tasks, n=3)
                raise UsageError(f"--tasks: lm-eval has no task '{task}'{'; near it: ' + ', '.join(near) if near else ''}.")
        found = simple_evaluate(
            adapter(model, tokenizer, max_length),
            tasks=local,
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            task_manager=manager,
            verbosity="ERROR",
        )
    assert found is not None
    return {task: _metrics(values) for task, values in found["results"].items()}


def require_lm_eval() -> None:
    """Raises MissingDependency without lm-eval."""
    if find_spec("lm_eval") is None:
        raise MissingDependency("--tasks: lm-eval is not installed; pip install 'questctl[eval]'.")


# --- tasks ------------------------------------------------------------------------------------------------------------


def load(word: str) -> str | dict[str, Any]:
    """A word of `--tasks` → a registered name, or the config of a task that reads local files.

    Raises DataError naming file, line and field; UsageError for a word that is neither.
    """
    if word.startswith(HUB):
        return word.removeprefix(HUB)
    path = Path(word)
    if path.suffix not in (".json", ".jsonl", ".yaml", ".yml"):
        raise UsageError(f"--tasks: '{word}' is no local file (.jsonl, .json, .yaml); registered tasks are written hf:{word}.")
    if not path.is_file():
        raise DataError(f"--tasks: {path} is not a file.")
    if path.suffix in (".yaml", ".yml"):
        from lm_eval.utils import load_yaml_config

        config: dict[str, Any] = load_yaml_config(str(path))
        return config
    return cloze(path)


def cloze(path: Path) -> dict[str, Any]:
    """The lm-eval config of a JSON or JSON-lines file of multiple-choice questions."""
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
        kind: next((f for f in fields if isinstance(lines[0][1], dict) and f in lines[0][1]), None)
        for kind, fields in FIELDS.items()
    }
    for kind, name in names.items():
        if name is None:
            there = ", ".join(lines[0][1]) if isinstance(lines[0][1], dict) else "no fields"
            raise DataError(f"{path}, {lines[0][0]}: has no {kind} ({' or '.join(FIELDS[kind])}); it has {there}.")
    for where, row in lines:
        choices, answer = (row.get(names[k]) if isinstance(row, dict) else None for k in ("choices", "answer"))
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise DataError(f"{path}, {where}: '{names['choices']}' is not a list of two or more texts.")
        if not str(answer).isdecimal() or int(str(answer)) >= len(choices):
            said = f"'{names['answer']}' is {answer!r}"
            raise DataError(f"{path}, {where}: {said}, not the index of one of {len(choices)} choices.")
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
    """`acc,none` → acc; what is no number (an alias, an error that was not estimated) is left out."""
    return {k.partition(",")[0]: float(v) for k, v in values.items() if isinstance(v, int | float)}


# --- model ------------------------------------------------------------------------------------------------------------


def adapter(model: Llama, tokenizer: Tokenizer, max_length: int) -> LM:
    """`model` as lm-eval wants it: log-likelihoods and generated text."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class QuestLM(TemplateLM):
        """Pairs are split into tokens as lm-eval splits them for every causal model."""

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
    """(context ids, continuation ids) → (log p of the continuation in nats, whether it is the greedy one).

    Long pairs keep their last `max_length` + 1 ids. Rows of equal length go together.
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
    """Greedy text after `context`, up to the first of `until["until"]`."""
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
