"""The objectives in Hugging Face's Trainer, for a model too large for one GPU (docs/changing.md):

torchrun --nproc-per-node 2 -m experiments.hf_trainer MODEL --data lists.jsonl --out out/new
"""

import os
import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from data import Example, load, make_batch, tokenize
from harness.config import Config, ConfigError, flag, kind_of, resolve, why_lists
from harness.pool import best_and_worst, comparable, mean_and_deviation, normalise
from harness.run import new_folder, run_script
from objectives import OBJECTIVES, Inputs

try:
    import accelerate
    import peft
    import transformers
except ImportError as e:
    sys.exit(f"hf_trainer: no {e.name} here: pip install transformers accelerate peft")


def read_lists(c: Config, tokenizer: transformers.PreTrainedTokenizerBase) -> list[Example]:
    """The lists of --data that the objective learns from, as token ids."""
    plain = {"add_special_tokens": False, "split_special_tokens": True}  # <s> in a text is text
    enc = SimpleNamespace(encode_ordinary=lambda text: tokenizer(text, **plain).input_ids)
    enc.eot_token, bos = tokenizer.eos_token_id, [tokenizer.bos_token_id]
    records = load(c.data, format=c.format)
    lists = comparable(c, tokenize(records, enc, c.max_prompt, c.max_response, print))
    if tokenizer("x").input_ids[:1] == bos:
        lists = [replace(e, prompt_ids=bos + e.prompt_ids) for e in lists]
    if "pairs" in OBJECTIVES[c.objective].needs:
        lists = [best_and_worst(e) for e in lists if max(e.rewards) > min(e.rewards)]
    if not lists:
        raise ConfigError(f"--objective {c.objective} {why_lists(c)}: no list has two unlike ones")
    if c.reward_norm == "global":
        scale = mean_and_deviation([reward for e in lists for reward in e.rewards])
        lists = [replace(e, rewards=normalise(e.rewards, scale)) for e in lists]
    return lists


def score(c: Config, model: nn.Module, lists: list[Example]) -> Inputs:
    """x of B lists by one forward pass over rows: a response each, its prompt before it."""
    batch = make_batch(lists, 0, next(model.parameters()).device)
    pad = lambda lines: nn.utils.rnn.pad_sequence([*map(batch.prompt_ids.new_tensor, lines)], True)
    rows = [(e.prompt_ids, ids) for e in lists for ids in e.response_ids]
    ids, real = pad([p + ids for p, ids in rows]), pad([[1] * len(p + ids) for p, ids in rows])
    has_values = "values" in OBJECTIVES[c.objective].needs
    outputs = model(input_ids=ids, attention_mask=real, output_hidden_states=has_values)
    logps, values = [], []
    for i, (prompt, response) in enumerate(rows):  # a token is predicted one place before it
        start, end = len(prompt), len(prompt + response)
        logits = outputs["logits"][i, start - 1 : end - 1].float()  # [R, V]
        logps.append(-nn.functional.cross_entropy(logits, ids[i, start:end], reduction="sum"))
        values += [outputs["values"][i, :start].float().mean()] if has_values else []
    per_list = lambda rows: batch.rewards.masked_scatter(batch.candidate_mask, torch.stack(rows))
    values = per_list(values)[:, 0] if has_values else None  # the same in all rows of a list
    mask = batch.candidate_mask & batch.prompt_mask.new_tensor([[bool(e.prompt)] for e in lists])
    lengths = batch.response_mask.sum(-1)
    return Inputs(per_list(logps), batch.ref_logps, batch.rewards, mask, lengths, values)


class ListTrainer(transformers.Trainer):
    """A Trainer whose loss is a sum over the lists (DRO: responses) of all processes, over n."""

    def get_batch_samples(self, *args: object) -> tuple[list[dict], Tensor]:
        """The batches of an update, and n."""
        # The reference is the model before its first update. By now an engine has wrapped it.
        lists, size = self.train_dataset, self.args.train_batch_size
        if "reference" in OBJECTIVES[self.c.objective].needs and not lists[0].ref_logps:
            with self.accelerator.split_between_processes(lists) as mine, torch.no_grad():
                parts = [mine[i : i + size] for i in range(0, len(mine), size)]
                scores = [score(self.c, self.model_wrapped, part).logps.tolist() for part in parts]
            for e, row in zip(lists, accelerate.utils.gather_object(sum(scores, []))):
                e.ref_logps = row[: len(e.rewards)]
        batches, _ = super().get_batch_samples(*args)
        counts = [len(e.rewards) for batch in batches for e in batch["lists"] if e.prompt]
        n = torch.tensor(len(counts) if why_lists(self.c) else sum(counts))
        return batches, self.accelerator.gather(n.to(self.args.device)).sum()

    def compute_loss(self, model: nn.Module, inputs: dict, *_: object, **given: Tensor) -> Tensor:
        """This process's part, times the processes, as the mean of their gradients is taken."""
        x = score(self.c, model, inputs["lists"])
        parts = OBJECTIVES[self.c.objective].loss(self.c, x).values()
        pairs = x.mask.any(-1).sum()  # a part is unreduced, or the mean over pairs
        total = sum(part.sum() if part.dim() else part * pairs for part in parts)
        return total * self.accelerator.num_processes / given["num_items_in_batch"]


def new_model(c: Config, name: str, lora: bool) -> nn.Module:
    """The starting model; DRO's V(x) is the mean over the prompt of a head on its states."""

    def add_values(module, args, outputs):  # inside forward, where FSDP has the whole weights
        states = outputs.hidden_states[-1].to(module.value_head.weight.dtype)
        return {"logits": outputs.logits, "values": module.value_head(states)}

    settings = transformers.AutoConfig.from_pretrained(name)
    settings.update({k: 0.0 for k, v in vars(settings).items() if "drop" in k and v})  # no noise
    dtype = "auto" if lora else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(name, config=settings, dtype=dtype)
    adapters = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    model = peft.get_peft_model(model, adapters) if lora else model
    if "values" in OBJECTIVES[c.objective].needs:
        model.value_head = nn.Linear(settings.get_text_config().hidden_size, 1, bias=False)
        nn.init.zeros_(model.value_head.weight)
        model._keys_to_ignore_on_save = {"value_head.weight"}
        model.register_forward_hook(add_values)
    return model


def main(argv: list[str] | None = None) -> None:
    """Train and save, by the options of a command line."""
    parser = transformers.HfArgumentParser(transformers.TrainingArguments, allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"hf_trainer: {message}")
    parser.add_argument("model")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--out", dest="output_dir", required=True)
    parser.add_argument("--lora", action="store_true")
    own = "objective format max_prompt max_response temperature reward_norm sft_weight tau beta"
    for f in (f for f in fields(Config) if f.name in own.split()):
        parser.add_argument(flag(f.name), type=kind_of(f), help=f.metadata["text"])
    parser.set_defaults(learning_rate=1e-5, logging_steps=10, use_cpu=not torch.cuda.is_available())
    parser.parse_args(argv)  # ends at an unknown option
    arguments, own = parser.parse_args_into_dataclasses(argv)
    options = {k: v for k, v in vars(own).items() if v is not None}
    name, lora, c = options.pop("model"), options.pop("lora"), resolve(Config(**options))
    able = {k: row for k, row in OBJECTIVES.items() if row.loss and "batch" not in row.needs}
    if OBJECTIVES[c.objective] not in able.values():
        parser.error(f"{c.objective} can't learn from part of a batch; {', '.join(able)} can")
    new_folder(arguments.output_dir)
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(name), new_model(c, name, lora)
    lists, size = read_lists(c, tokenizer), arguments.train_batch_size * arguments.world_size
    longest = max(len(e.prompt_ids + ids) for e in lists for ids in e.response_ids)
    if longest > (most := getattr(model.config, "max_position_embeddings", longest)):
        parser.error(f"{name} reads {most} tokens, a list has {longest}: lower --max-prompt")
    lists += [replace(lists[0], prompt="")] * (-len(lists) % size)  # a full last batch; not counted
    trainer = ListTrainer(model, arguments, lambda x: {"lists": x}, lists, None, tokenizer)
    trainer.c, trainer.model_accepts_loss_kwargs = c, True  # compute_loss divides, nothing else
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    sys.stdout = None if os.environ.get("RANK", "0") != "0" else sys.stdout  # one process speaks
    run_script("hf_trainer", main, ValueError)  # transformers refuses a setting or a folder so
