"""Run by the interpreter of `.runtimes/vllm`: what vLLM computes of an exported folder on a CPU.

stdin and stdout as in runtime_llama.py, with log-probabilities in place of logits; {"dtype": "float32", "eager": true} go to
vLLM.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
job, stdout = json.load(sys.stdin), os.dup(1)
os.dup2(2, 1)  # what is printed on the way does not belong to the result

import vllm  # noqa: E402

longest = max([len(job["prompt"]) + job["new"], *(len(tokens) for tokens in job["tokens"])]) + 1
model = vllm.LLM(
    job["model"],
    dtype=job["dtype"],
    enforce_eager=job["eager"],
    trust_remote_code=True,
    max_model_len=longest,
    max_logprobs=-1,
    max_num_seqs=4,
    model_impl=job.get("implementation", "auto"),
)
size = model.llm_engine.model_config.get_vocab_size()
every = vllm.SamplingParams(max_tokens=1, prompt_logprobs=-1, temperature=0)
done = model.generate([{"prompt_token_ids": tokens} for tokens in job["tokens"]], every, use_tqdm=False)
logits = [[[place[i].logprob for i in range(size)] for place in request.prompt_logprobs[1:]] for request in done]
most = vllm.SamplingParams(max_tokens=job["new"], min_tokens=job["new"], temperature=0)
(request,) = model.generate([{"prompt_token_ids": job["prompt"]}], most, use_tqdm=False)
tokenizer = model.get_tokenizer()
ids = [list(tokenizer(text, add_special_tokens=False).input_ids) for text in job["texts"]]
found = {"version": vllm.__version__, "logits": logits, "greedy": list(request.outputs[0].token_ids), "ids": ids}
with os.fdopen(stdout, "w") as out:
    json.dump(found, out)
