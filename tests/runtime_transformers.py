"""Run where `import questctl` fails: what transformers alone computes of an exported folder, also in a batch with padding.

stdin and stdout as in runtime_llama.py; {"loader": true} takes the folder's load_rotated.py.
"""

import json
import sys

sys.modules["questctl"] = None  # any import of it fails

import torch  # noqa: E402
import transformers  # noqa: E402

job = json.load(sys.stdin)
folder = job["model"]
torch.set_num_threads(1)
if job.get("loader"):
    sys.path.insert(0, folder)
    from load_rotated import load

    model = load(folder)
else:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    logits = [model(torch.tensor([tokens])).logits[0].float() for tokens in job["tokens"]]
    length = max(map(len, job["tokens"]))
    padded = torch.tensor([[tokenizer.pad_token_id] * (length - len(tokens)) + tokens for tokens in job["tokens"]])
    mask = torch.tensor([[0] * (length - len(tokens)) + [1] * len(tokens) for tokens in job["tokens"]])
    batch = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)).logits.float()
    rows = [row[length - len(tokens) :] for row, tokens in zip(batch, job["tokens"], strict=True)]
    prompt = torch.tensor([job["prompt"]])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=job["new"], min_new_tokens=job["new"], do_sample=False
    )
found = {
    "version": transformers.__version__,
    "logits": [row.tolist() for row in logits],
    "padded": [row.tolist() for row in rows],
    "greedy": out[0, len(job["prompt"]) :].tolist(),
    "ids": [tokenizer(text, add_special_tokens=False).input_ids for text in job["texts"]],
}
json.dump(found, sys.stdout)
