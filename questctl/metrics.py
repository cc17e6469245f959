"""The keys of the values that a run logs, with their units: the keys in the lines of `metrics.jsonl` and `timing.jsonl`.

The training loop and all readers take the keys from here. This module imports nothing, so that readers need not load torch.
"""

STEP = "step"  # in every line: optimizer steps done

# metrics.jsonl: values that are the same in every execution of a config on the same machine
TOKENS = "tokens"  # training tokens so far
TRAIN_LOSS = "train_loss(nats/token)"  # mean over the steps since the previous line
TEACHER_KL = "teacher_kl(nats/token)"  # divergence of the model from its teacher, at teacher.temperature; mean as of the loss
VAL_LOSS = "val_loss(nats/token)"  # only in the lines of steps at which the run evaluates
VAL_LOSS_AVERAGE = "val_loss_average(nats/token)"  # with the averaged weights (optim.average), in the same lines
LR = "lr"  # learning rate of the last step
GRAD_NORM = "grad_norm"  # before clipping; mean over the steps since the previous line
LOSS_SPIKE = "loss_spike(nats/token)"  # largest loss of the window over the level of the windows before it, at least 0
GRAD_NORM_GROWTH = "grad_norm_growth(ratio)"  # gradient norm of the window over the level of the windows before it

# timing.jsonl: values that differ from one execution to the next
TOKENS_PER_S = "tokens/s"
STEP_TIME = "step_time(ms)"
TIME = "time"  # ISO 8601, UTC

OPERANDS = ("weight", "activation")  # what a quantized layer quantizes


def trust(operand: str) -> str:
    """Key of the share of an operand's entries that receive gradient; its value maps layers to shares."""
    return f"{operand}_trust(fraction)"


def saturation(operand: str) -> str:
    """Key of the share of an operand's entries that are clamped to the outermost level; its value maps layers to shares."""
    return f"{operand}_saturation(fraction)"
