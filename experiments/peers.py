"""The same update by the libraries that people have, for `python -m experiments.bench --peer NAME`.

hf   transformers' GPT-2 with our weights: the prompt repeated for each of its M responses, logits
     of the whole vocabulary at every token, as most published code has it. An update is forward
     and backward.
trl  TRL's DPOTrainer on pairs, its reference log-probs computed beforehand. A step is all that its
     loop does, from one step's end to the next: batch, forward, backward, clip, AdamW. Ours follows
     each of its steps, on the same pairs; both losses are compared, so both do the same work.

Both run in turn; median and quartiles of the times, and of the ratio pair by pair.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import data
import model as models
from baselines import dpo_loss
from experiments.export import hub_config, hub_weights
from experiments.timing import quartiles, spread, timed, timed_pairs

# ------------------------------------------------------------------------------------ transformers


def hf_model(model: models.GPT, device: str) -> nn.Module:
    """transformers' GPT-2 with the weights of ours, without dropout."""
    import transformers

    dropout = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    size = dataclasses.replace(model.config, eos=model.config.vocab_size - 1)
    config = transformers.GPT2Config(**hub_config(size), **dropout)
    other = transformers.GPT2LMHeadModel(config)
    other.load_state_dict(hub_weights(model.state_dict(), model.config), strict=False)
    return other.to(device)  # its head is tied to the embedding: no weight is missing


def hf_logps(other: nn.Module, batch: data.Batch) -> Tensor:
    """log pi [B, M] of a batch without padding, by transformers."""
    B, M, R = batch.response_ids.shape
    prompts = batch.prompt_ids.repeat_interleave(M, 0)  # [B * M, S]
    whole = torch.cat([prompts, batch.response_ids.flatten(0, 1)], 1)  # [B * M, S + R]
    logits = other(whole, attention_mask=torch.ones_like(whole), use_cache=False).logits
    token_logps = logits[:, :-1].float().log_softmax(-1)  # [B * M, S + R - 1, V]
    token_logps = token_logps.gather(-1, whole[:, 1:, None])[..., 0]
    return token_logps[:, -R:].sum(-1).unflatten(0, (B, M))


def hf_row(model: models.GPT, batch: data.Batch, pairs: int, device: str) -> dict[str, Any]:
    """Seconds of our update and of transformers', and how far their log-probs are apart.

    Raises: ValueError where they score differently.
    """
    other = hf_model(model, device)
    with torch.no_grad():
        ours, theirs = models.response_logps(model, batch), hf_logps(other, batch)
    apart = (ours - theirs).abs().max().item()
    if not apart < 1e-4 * theirs.abs().max().item():
        raise ValueError(f"the log-probs differ by {apart} nats: there is nothing to compare")

    def update(who: nn.Module, score: Callable) -> None:
        who.zero_grad()
        score(who, batch).mean().backward()

    first, second = lambda: update(model, models.response_logps), lambda: update(other, hf_logps)
    return compared(timed_pairs(first, second, pairs, device), apart)


def hf_flops(config: models.GPTConfig, B: int, M: int, S: int, R: int) -> float:
    """Floating-point operations of transformers' update, counted as `bench.useful_flops` does.

    B M (6 W T + 6 V D T + 12 L D T (T + 1) / 2) with T = S + R tokens, all of which meet the head.
    """
    L, D, V, T = config.layers, config.width, config.vocab_size, S + R
    return B * M * (72 * L * D**2 * T + 6 * V * D * T + 6 * L * D * T * (T + 1))


def compared(times: tuple[list[float], list[float]], apart: float) -> dict[str, Any]:
    """Quartiles of the seconds of ours and theirs, and of the ratio pair by pair."""
    return {
        "ours": quartiles(times[0]),
        "theirs": quartiles(times[1]),
        "ratio": quartiles([b / a for a, b in zip(*times)]),
        "apart": apart,
    }


# --------------------------------------------------------------------------------------------- TRL

BETA, RATE = 0.1, 1e-4
UNTIMED = 3  # first steps


def random_pairs(count: int, S: int, R: int, vocab_size: int) -> list[data.Example]:
    """Prompts of S tokens with two responses of R, the last of which is EOS, vocab_size - 1."""
    generator = torch.Generator().manual_seed(0)

    def words(length: int) -> list[int]:
        return torch.randint(vocab_size - 1, (length,), generator=generator).tolist()

    eos = [vocab_size - 1]
    return [
        data.Example("", words(S), [words(R - 1) + eos, words(R - 1) + eos], [1.0, 0.0])
        for _ in range(count)
    ]


def word_tokenizer(vocab_size: int) -> Any:
    """A tokenizer of transformers whose tokens are the words w0, w1 ...; </s> is the last id."""
    import tokenizers
    import transformers

    words = {f"w{i}": i for i in range(vocab_size - 1)} | {"</s>": vocab_size - 1}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=own, eos_token="</s>", pad_token="</s>"
    )


def as_text(example: data.Example) -> dict[str, str]:
    """A pair as TRL reads it; it puts </s> at the end by itself."""
    chosen, rejected = (" ".join(f"w{i}" for i in ids[:-1]) for ids in example.response_ids)
    prompt = "".join(f"w{i} " for i in example.prompt_ids)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


class OurSteps:
    """DPO as train.py does it: batch, forward, backward, clip, AdamW."""

    def __init__(self, model: models.GPT, examples: list[data.Example], B: int) -> None:
        self.model, self.examples, self.B, self.losses = model, examples, B, []
        self.eos = model.config.vocab_size - 1
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=RATE, weight_decay=0.0, fused=True
        )
        with torch.no_grad():
            for start in range(0, len(examples), B):
                some = examples[start : start + B]
                logps = models.response_logps(model, data.make_batch(some, self.eos))
                for example, row in zip(some, logps.tolist()):
                    example.ref_logps = row

    def step(self) -> None:
        """The next B pairs."""
        start = len(self.losses) * self.B
        batch = data.make_batch(self.examples[start : start + self.B], self.eos)
        logps = models.response_logps(self.model, batch)
        loss = dpo_loss(*logps.unbind(1), *batch.ref_logps.unbind(1), BETA).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())


def trl_row(model: models.GPT, B: int, S: int, R: int, steps: int) -> dict[str, Any]:
    """Seconds of our steps and of DPOTrainer's on the same B pairs, one after the other.

    Raises: ValueError where their losses differ.
    """
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    V = model.config.vocab_size
    examples = random_pairs((steps + UNTIMED) * B, S, R, V)
    other, own = hf_model(model, "cpu"), OurSteps(model, examples, B)
    times, losses = ([], []), []

    class Turns(transformers.TrainerCallback):
        """Ours after each of theirs; `began` is where theirs goes on."""

        def on_train_begin(self, args, state, control, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            times[1].append(time.perf_counter() - self.began)
            times[0].append(timed(own.step, "cpu"))
            self.began = time.perf_counter()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                losses.append(logs["loss"])

    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder,
            max_steps=steps + UNTIMED,
            per_device_train_batch_size=B,
            learning_rate=RATE,
            lr_scheduler_type="constant",
            beta=BETA,
            max_length=None,
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            logging_steps=steps + UNTIMED,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        )
        trainer = DPOTrainer(
            other,
            args=settings,
            train_dataset=Dataset.from_list([as_text(e) for e in examples]),
            processing_class=word_tokenizer(V),
            callbacks=[Turns()],
        )
        trainer.train()
    apart = abs(losses[0] - statistics.mean(own.losses))
    if not apart < 1e-3:
        raise ValueError(f"the mean losses differ by {apart}: there is nothing to compare")
    return compared(tuple(t[UNTIMED:] for t in times), apart)


def table(results: dict[str, Any]) -> str:
    """The table in Markdown."""
    lines = [
        "| model | B | M, S, R | ours, ms | theirs, ms | ratio [quartiles] | ratio of tokens "
        "| ratio of operations |",
        "|" + "---|" * 8,
    ]
    for row in results["rows"]:
        ours, theirs = (spread(row[who], 1e3, 0) for who in ("ours", "theirs"))
        flops = f"{row['flops_ratio']:.2f}" if row["flops_ratio"] else "-"
        lines.append(
            f"| {row['model']} | {row['B']} | {row['M']}, {row['S']}, {row['R']} | {ours} "
            f"| {theirs} | {spread(row['ratio'])} | {row['token_ratio']:.2f} | {flops} |"
        )
    return "\n".join(lines)
