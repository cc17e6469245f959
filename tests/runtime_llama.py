"""Run by the interpreter of `.runtimes/llama.cpp`: what llama.cpp computes of a GGUF file, and how it cuts texts into tokens.

stdin: {"model": path, "tokens": [[…], …], "prompt": […], "new": n, "texts": [[…characters…], …]} as JSON
stdout: {"version", "logits": [[[…]]], "greedy": […], "ids": [[…]]} as JSON
"""

import json
import sys

import llama_cpp

job = json.load(sys.stdin)
longest = max([len(job["prompt"]) + job["new"], *(len(tokens) for tokens in job["tokens"])])
model = llama_cpp.Llama(job["model"], n_ctx=longest, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1)
logits = []
for tokens in job["tokens"]:
    model.reset()
    model.eval(tokens)
    logits.append(model.scores[: len(tokens)].tolist())
model.reset()
greedy = [token for token, _ in zip(model.generate(job["prompt"], temp=0.0), range(job["new"]), strict=False)]
ids = [model.tokenize(text.encode(), add_bos=False, special=False) for text in job["texts"]]
json.dump({"version": llama_cpp.__version__, "logits": logits, "greedy": greedy, "ids": ids}, sys.stdout)
