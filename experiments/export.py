"""A run's policy and tokenizer as a Hugging Face folder, for tools that serve such models:

python -m experiments.export out/lire-dialogue-0 my-model

transformers' AutoModelForCausalLM (of a GPT) or AutoModelForSeq2SeqLM (of a T5) and AutoTokenizer
load it, encode the same ids and give the same logits. Its generation config samples as a run does,
at temperature 1 over all tokens; ids that the policy never says are suppressed. safetensors is used
where it is installed; the tokenizer is written by the tokenizers package.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import data
from data import EOS
from harness.command_line import saved_config
from harness.config import ConfigError
from harness.pretrained import HubEncoding, Pretrained, hub_name, is_run, oriented, read_folder
from harness.run import new_folder, run_script, save
from model import GPTConfig
from t5 import BUCKETS, MAX_DISTANCE, T5Config


def export(run: str, folder: str) -> None:
    """Write a run's policy and tokenizer into `folder`, which is made.

    Raises: ConfigError, DataError where `run` is no run, where its task allows some tokens only, or
        where `folder` holds something already.
    """
    if not is_run(run):
        raise ConfigError(f"{run}: no model.json in it, expected the folder of a run")
    c, found, out = saved_config(run), read_folder(run), new_folder(folder)
    if not c.data and (task := data.make_task(c.task, c.seed)).words:
        raise ConfigError(
            f"{run}: on --task {c.task} a response may hold {len(task.words)} words and no others, "
            "which other tools don't know"
        )
    enc, weights = found.encoding(), found.weights()
    tokenizer, eos = hub_tokenizer(enc)
    out.mkdir(parents=True, exist_ok=True)
    save_weights(hub_weights(weights, found.config), out)
    config = hub_config(found.config)
    for name, content in {
        "config.json": config,
        "generation_config.json": generation_config(config, enc.n_vocab),
        "tokenizer_config.json": tokenizer_config(found, enc, eos),
    }.items():
        save(json.dumps(content, indent=1), out / name)
    save(tokenizer, out / "tokenizer.json")
    print(f"{folder}: transformers' {config['architectures'][0]} and its tokenizer")


# -------------------------------------------------------------------------------- model and weights


def hub_config(config: GPTConfig | T5Config) -> dict[str, Any]:
    """config.json, as transformers names things. A T5's vocabulary counts its start token."""
    common = {"eos_token_id": config.eos, "dtype": "float32"}
    if isinstance(config, GPTConfig):
        return common | {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": config.vocab_size,
            "n_positions": config.context,
            "n_layer": config.layers,
            "n_head": config.heads,
            "n_embd": config.width,
            "bos_token_id": config.eos,
            "pad_token_id": config.eos,
        }
    return common | {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": max(config.vocab_size, config.start + 1),
        "num_layers": config.layers,
        "num_heads": config.heads,
        "d_model": config.width,
        "d_kv": config.head_width,
        "d_ff": config.mlp_width,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "relative_attention_num_buckets": BUCKETS,
        "relative_attention_max_distance": MAX_DISTANCE,
        "decoder_start_token_id": config.start,
        "pad_token_id": config.start,
    }


def hub_weights(weights: dict[str, Tensor], config: GPTConfig | T5Config) -> dict[str, Tensor]:
    """The weights under transformers' names; a T5's head gets a row of 0 for its start token."""
    theirs = {hub_name(name): oriented(name, weight) for name, weight in weights.items()}
    if isinstance(config, T5Config):
        missing = len(theirs["shared.weight"]) - len(theirs["lm_head.weight"])
        theirs["lm_head.weight"] = F.pad(theirs["lm_head.weight"], (0, 0, 0, missing))
    return theirs


def generation_config(config: dict[str, Any], tokens: int) -> dict[str, Any]:
    """Sampling as a run does it: at temperature 1, and of all tokens that the tokenizer has."""
    names = [name for name in config if name.endswith("token_id")]
    content = {name: config[name] for name in names} | {"do_sample": True, "top_k": 0}
    unsaid = list(range(tokens, config["vocab_size"]))
    return content | ({"suppress_tokens": unsaid} if unsaid else {})


def save_weights(weights: dict[str, Tensor], folder: Path) -> None:
    """model.safetensors, or pytorch_model.bin where safetensors is not installed."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})


# -------------------------------------------------------------------------------------- tokenizer


def hub_tokenizer(enc: Any) -> tuple[str, str]:
    """tokenizer.json of an encoding, and the name of its EOS.

    Raises: ConfigError where the tokenizers package is missing.
    """
    if isinstance(enc, HubEncoding):
        return enc.text, enc.decoder.id_to_token(enc.eot_token)
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        raise ConfigError("export needs tokenizers: pip install tokenizers") from None
    ranks = enc._mergeable_ranks
    letters = byte_letters()
    spelt = {token: "".join(letters[b] for b in token) for token in ranks}
    vocab = {spelt[token]: rank for token, rank in ranks.items()} | {EOS: enc.eot_token}
    pairs = [(spelt[left], spelt[right]) for left, right in all_merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=True))
    words = pre_tokenizers.Split(Regex(enc._pat_str), "isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    return tokenizer.to_str(), EOS


def all_merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every way to put a token together from two others, the tokens by rank.

    tiktoken joins any two neighbours that are a token together, lowest rank first; elsewhere a BPE
    joins the pairs of a list, first pair first.

    >>> all_merges({b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"bc": 4, b"abc": 5})
    [(b'a', b'b'), (b'b', b'c'), (b'a', b'bc'), (b'ab', b'c')]
    """
    return [
        (token[:i], token[i:])
        for token in sorted(ranks, key=ranks.get)
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]


def byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in GPT-2's files: itself where it can be printed."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(printed))
    return {b: chr(b) for b in printed} | {b: chr(256 + k) for k, b in enumerate(others)}


def tokenizer_config(found: Pretrained, enc: Any, eos: str) -> dict[str, Any]:
    """tokenizer_config.json. A special token in a text is text, as it is here.

    Prompts of a batch are padded: a T5's by its own pad token, where it has one, others by EOS. A
    GPT writes on at the end of a prompt, so padding stands before it.
    """
    content, pad = {}, eos
    if found.model == "gpt":
        content = {"model_max_length": found.config.context, "padding_side": "left"}
    elif isinstance(enc, HubEncoding):
        pad = enc.decoder.id_to_token(found.config.start) or eos
    return content | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "pad_token": pad,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of a run of train.py")
    parser.add_argument("folder", help="where to write, a new one")
    export(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_script("export", main)
