"""Models that are there already: a GPT-2 or T5 in a Hugging Face folder, or a run of train.py.

    found = read_folder("gpt2")     what model it is, of what size; its tokenizer; not the weights
    found.encoding()                encode_ordinary, decode, n_vocab, eot_token, as tiktoken's
    found.weights()                 of our GPT or T5

A run has model.json beside its tokenizer and its checkpoint. safetensors and tokenizers are
optional packages: a folder that needs one of them says so.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import data
from model import GPT, GPTConfig
from records import DataError, short
from t5 import BUCKETS, MAX_DISTANCE, T5, T5Config


@dataclass
class Pretrained:
    """What a folder holds."""

    folder: Path
    model: str  # "gpt" or "t5"
    config: GPTConfig | T5Config
    is_run: bool  # of ours
    from_elsewhere: bool  # no run of ours, or one that began with such a folder

    @property
    def positions(self) -> float:
        """The most tokens of prompt and response together."""
        return self.config.context if self.model == "gpt" else math.inf

    def new_model(self) -> nn.Module:
        """A model of this size with fresh weights."""
        return (GPT if self.model == "gpt" else T5)(self.config)

    def weights(self) -> dict[str, Tensor]:
        """The weights, float32, under our names.

        Raises: DataError where one is missing, quantised or of another shape, or a file is damaged.
        """
        theirs = {}
        for path in self.files():
            theirs |= read_weights(path)
        with torch.device("meta"):  # shapes alone
            wanted = self.new_model().state_dict()
        found = theirs if self.is_run else renamed(theirs, wanted)
        for name, weight in wanted.items():
            if name not in found:
                raise DataError(f"{self.folder}: {name} is missing among its weights")
            if found[name].shape != weight.shape:
                raise DataError(
                    f"{self.folder}: {name} is {list(found[name].shape)}, its config says "
                    f"{list(weight.shape)}"
                )
            if not found[name].is_floating_point():  # quantised: the scales have other names
                raise DataError(f"{self.folder}: {name} is {found[name].dtype}, expected floats")
        return {name: found[name].float() for name in wanted}

    def files(self) -> list[Path]:
        """The files of the weights."""
        if self.is_run:
            return [self.folder / "checkpoint.pt"]
        return files_of_weights(self.folder)

    def digest(self) -> str:
        """sha256 over the files of the weights."""
        digest = hashlib.sha256()
        for path in self.files():
            with open(path, "rb") as file:
                while block := file.read(2**24):
                    digest.update(block)
        return digest.hexdigest()

    def encoding(self) -> Any:
        """The tokenizer: a tiktoken.Encoding, or a HubEncoding.

        Raises: DataError where there is none, where it is damaged, or has too many tokens.
        """
        return encoding_in(self.folder, self.config)

    def ranks(self) -> dict[bytes, int] | None:
        """Of the tokenizer, where it is one of ours."""
        path = self.folder / "tokenizer.txt"
        return data.load_ranks(path) if path.exists() else None


def read_folder(folder: str | Path) -> Pretrained:
    """Read what model a folder holds.

    Raises: DataError where it is none, or of an architecture that is not ours, in one line.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            f"{short(folder)} is no folder, expected that of a GPT-2, a T5 or a run: docs/models.md"
        )
    ours = is_run(folder)
    name, key = ("model.json", "model") if ours else ("config.json", "model_type")
    path = folder / name
    found = read_object(path, key)
    try:
        elsewhere = found.pop("from_elsewhere", False) if ours else True
        if ours:
            kind = found.pop("model")
            config = {"gpt": GPTConfig, "t5": T5Config}[kind](**found)
        else:
            kind, reader = reader_of(folder, found["model_type"])
            config = reader(folder, found)
        check_sizes(config)
    except (KeyError, TypeError) as e:
        raise DataError(f"{path} is damaged ({short(e)})") from None
    return Pretrained(folder, kind, config, ours, elsewhere)


MOST_LAYERS, LARGEST = 1000, 10**6  # sizes of a model; a larger one is a slip


def check_sizes(config: GPTConfig | T5Config) -> None:
    """Refuse a size that no model has, before memory is asked for it.

    Raises: TypeError.
    """
    for name, size in dataclasses.asdict(config).items():
        least = 0 if name in ("eos", "start") else 1
        most = MOST_LAYERS if name == "layers" else LARGEST
        if type(size) is not int or not least <= size <= most:
            raise TypeError(f"{name} {short(repr(size))}, expected {least} to {most}")
    if isinstance(config, GPTConfig) and config.width % config.heads:
        raise TypeError(f"width {config.width} is not a multiple of {config.heads} heads")


def is_run(folder: str | Path) -> bool:
    """Is it the folder of a run of ours?"""
    return (Path(folder) / "model.json").exists()


def read_object(path: Path, key: str) -> dict:
    """The object in a JSON file that has this key."""
    try:
        value = json.loads(path.read_text())
        value[key]
        return value
    except OSError:
        reason = "is not there"
    except KeyError:
        reason = f"has no {key!r}"
    except (ValueError, TypeError, RecursionError):
        reason = f"is damaged: no {key!r} in it"
    raise DataError(f"{path} {reason}, expected that of a GPT-2, a T5 or a run that has a model")


# ------------------------------------------------------------------------- configs of GPT-2 and T5


def expect(folder: Path, config: dict, ours: dict[str, tuple]) -> None:
    """Refuse a config that says otherwise.

    Args: ours: for each name what transformers takes where a config has none, then what is ours.
    """
    whose = " (as T5 v1.1 and FLAN-T5)" if config["model_type"] == "t5" else ""
    for name, (default, *values) in ours.items():
        value = config.get(name, default)
        if value not in values:
            raise DataError(
                f"{folder}: {name} is {short(repr(value))}, expected "
                f"{' or '.join(map(repr, values))}{whose}"
            )


def token_id(folder: Path, config: dict, name: str, default: int) -> int:
    """The id of a special token."""
    value, V = config.get(name, default), config["vocab_size"]
    if not isinstance(value, int) or not 0 <= value < V:
        raise DataError(f"{folder}: {name} is {short(repr(value))}, expected one of {V} tokens")
    return value


def gpt2_config(folder: Path, config: dict) -> GPTConfig:
    """The size of a GPT-2."""
    V, context, D = (config[name] for name in ("vocab_size", "n_positions", "n_embd"))
    ours = {
        "activation_function": ("gelu_new", "gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5, 1e-5),
        "n_inner": (None, None, 4 * D),
        "scale_attn_weights": (True, True),
        "scale_attn_by_inverse_layer_idx": (False, False),
        "tie_word_embeddings": (True, True),
    }
    expect(folder, config, ours)
    eos = token_id(folder, config, "eos_token_id", 50256)
    return GPTConfig(V, context, config["n_layer"], config["n_head"], D, eos)


def t5_config(folder: Path, config: dict) -> T5Config:
    """The size of a T5 v1.1 (FLAN is one too): gated GELU, a head of its own."""
    layers = config["num_layers"]
    ours = {
        "feed_forward_proj": ("relu", "gated-gelu"),
        # T5 1.0 scales what its tied head reads; older files say so by the tie alone.
        "scale_decoder_outputs": (config.get("tie_word_embeddings", True), False),
        "num_decoder_layers": (layers, layers, None),
        "relative_attention_num_buckets": (BUCKETS, BUCKETS),
        "relative_attention_max_distance": (MAX_DISTANCE, MAX_DISTANCE),
        "layer_norm_epsilon": (1e-6, 1e-6),
    }
    expect(folder, config, ours)
    return T5Config(
        vocab_size=config["vocab_size"],
        layers=layers,
        heads=config["num_heads"],
        width=config["d_model"],
        head_width=config["d_kv"],
        mlp_width=config["d_ff"],
        eos=token_id(folder, config, "eos_token_id", 1),
        start=token_id(folder, config, "decoder_start_token_id", 0),
    )


def reader_of(folder: Path, model_type: str) -> tuple[str, Callable]:
    """Our name of an architecture, and what reads its config."""
    readers = {"gpt2": ("gpt", gpt2_config), "t5": ("t5", t5_config)}
    if model_type not in readers:
        raise DataError(
            f"{folder}: model_type is {short(repr(model_type))}, expected gpt2 or t5; "
            "experiments.hf_trainer takes other causal language models"
        )
    return readers[model_type]


# -------------------------------------------------------------------------------------- the weights

CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # of GPT-2, stored transposed


T5_NAMES = {  # ours -> transformers', inside encoder or decoder; MLP is its last sublayer
    r"positions": r"block.0.layer.0.SelfAttention.relative_attention_bias",
    r"norm": r"final_layer_norm",
    r"blocks\.(\d+)\.attn_norm": r"block.\1.layer.0.layer_norm",
    r"blocks\.(\d+)\.attn\.(\w)": r"block.\1.layer.0.SelfAttention.\2",
    r"blocks\.(\d+)\.cross_norm": r"block.\1.layer.1.layer_norm",
    r"blocks\.(\d+)\.cross\.(\w)": r"block.\1.layer.1.EncDecAttention.\2",
    r"blocks\.(\d+)\.mlp_norm": r"block.\1.layer.MLP.layer_norm",
    r"blocks\.(\d+)\.(wi_0|wi_1|wo)": r"block.\1.layer.MLP.DenseReluDense.\2",
}


def hub_name(name: str) -> str:
    """Our name of a weight as transformers has it.

    >>> hub_name("h.0.ln_1.bias"), hub_name("decoder.blocks.1.wo.weight")
    ('transformer.h.0.ln_1.bias', 'decoder.block.1.layer.2.DenseReluDense.wo.weight')
    """
    stack, _, place = name.partition(".")
    if stack in ("shared", "lm_head"):
        return name
    if stack not in ("encoder", "decoder"):
        return f"transformer.{name}"
    place = place.removesuffix(".weight")
    for ours, theirs in T5_NAMES.items():
        if match := re.fullmatch(ours, place):
            place = match.expand(theirs).replace("MLP", "1" if stack == "encoder" else "2")
            return f"{stack}.{place}.weight"
    raise KeyError(name)


def oriented(name: str, weight: Tensor) -> Tensor:
    """A weight as it is stored elsewhere; done twice, as it was."""
    return weight.t().contiguous() if name.endswith(CONV1D) else weight


def renamed(theirs: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Their weights under our names; what we have no name for (masks, copies) is left out.

    A T5 that has no head of its own reads the words' embedding as one.
    """
    found = {}
    if "shared.weight" in theirs:
        theirs = {"lm_head.weight": theirs["shared.weight"], **theirs}
    for name in names:
        there = hub_name(name)
        there = there if there in theirs else there.removeprefix("transformer.")
        if there in theirs:
            found[name] = oriented(name, theirs[there])
    return found


def files_of_weights(folder: Path) -> list[Path]:
    """model.safetensors or pytorch_model.bin, or the pieces of one."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.exists():
            pieces = read_object(index, "weight_map")["weight_map"]
            try:
                return [folder / piece for piece in sorted(set(pieces.values()))]
            except (AttributeError, TypeError) as e:
                raise DataError(f"{index} is damaged ({short(e)})") from None
        if (folder / name).exists():
            return [folder / name]
    raise DataError(f"{folder}: no model.safetensors and no pytorch_model.bin")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a file; of a run's checkpoint the policy's.

    Raises: DataError where it can't be read, or safetensors is missing.
    """
    try:
        if path.suffix != ".safetensors":
            content = torch.load(path, map_location="cpu", weights_only=True)
            content = content["policy"] if path.name == "checkpoint.pt" else content
            return {name: weight for name, weight in content.items() if torch.is_tensor(weight)}
        from safetensors.torch import load_file

        return load_file(path)
    except ImportError:
        raise DataError(f"{path} needs safetensors: pip install safetensors") from None
    except FileNotFoundError:
        raise DataError(f"{path} is not there") from None
    except Exception as e:  # a damaged file fails in many ways
        raise DataError(f"{path} can't be read ({short(e)})") from None


# ------------------------------------------------------------------------------------ the tokenizer


def encoding_in(folder: Path, config: GPTConfig | T5Config) -> Any:
    """A run's tokenizer.txt, tiktoken's gpt2 where the vocabulary is its own, or tokenizer.json.

    Raises: DataError where there is none, where it is damaged, or where it has too many tokens.
    """
    ours, theirs = folder / "tokenizer.txt", folder / "tokenizer.json"
    if ours.exists():
        try:
            enc = data.encoding(data.load_ranks(ours))
        except (OSError, ValueError) as e:
            raise DataError(f"{ours} is damaged ({short(e)})") from None
    elif is_gpt2s(theirs, config):
        try:
            enc = data.gpt2_encoding()
        except DataError:  # tiktoken could not download it
            if not theirs.exists():
                raise
            enc = HubEncoding(theirs, config)
    elif theirs.exists():
        enc = HubEncoding(theirs, config)
    else:
        raise DataError(
            f"{folder}: no tokenizer.json; transformers writes one: "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    if enc.n_vocab > config.vocab_size:
        raise DataError(
            f"{folder}: its tokenizer has {enc.n_vocab} tokens, its model {config.vocab_size}"
        )
    return enc


def is_gpt2s(path: Path, config: GPTConfig | T5Config) -> bool:
    """Is a model's vocabulary GPT-2's own? Its tokenizer.json, where there is one, must agree."""
    if (config.vocab_size, config.eos) != (50257, 50256):
        return False
    if not path.exists():
        return True
    vocabulary = read_object(path, "model")["model"].get("vocab")
    # The word " the" (a space is written as \u0120) is token 262 of GPT-2.
    return isinstance(vocabulary, dict) and vocabulary.get("\u0120the") == 262


class HubEncoding:
    """A tokenizer.json behind the calls that are used of a tiktoken.Encoding.

    A T5 has learned from prompts that end in EOS, which its tokenizer.json puts there: `prompt_end`
    is what follows a prompt.
    """

    def __init__(self, path: Path, config: GPTConfig | T5Config) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise DataError(f"{path} needs tokenizers: pip install tokenizers") from None
        try:
            self.text = path.read_text()
            self.decoder = Tokenizer.from_str(self.text)
            self.encoder = Tokenizer.from_str(without_special_tokens(self.text))
        except Exception as e:  # tokenizers raises no other
            raise DataError(f"{path} is damaged ({short(e)})") from None
        self.encoder.no_truncation()
        self.encoder.no_padding()
        self.eot_token = config.eos
        added = self.decoder.encode("").ids
        self.prompt_end = added if isinstance(config, T5Config) and added == [config.eos] else []
        self.n_vocab = max(self.decoder.get_vocab().values()) + 1

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of a text, nothing added; what looks like a special token is text.

        Raises: DataError where the tokenizer has no token for a part of it.
        """
        try:
            return self.encoder.encode(text, add_special_tokens=False).ids
        except Exception as e:  # tokenizers raises no other
            shown = short(repr(text))
            raise DataError(f"tokenizer.json can't encode {shown} ({short(e)})") from None

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        return self.decoder.decode(ids, skip_special_tokens=False)


def without_special_tokens(text: str) -> str:
    """A tokenizer.json that finds no special token in a text.

    The words of a T5 hold "</s>" a second time, so there it gets a name that no text has.
    """
    content = json.loads(text)
    added = content.get("added_tokens", [])
    special = [token for token in added if token["special"]]
    content["added_tokens"] = [token for token in added if not token["special"]]
    if content["model"]["type"] == "Unigram":
        words = content["model"]["vocab"]
        for token in special:
            if token["id"] < len(words):
                words[token["id"]][0] = f"\0{token['id']}"
    return json.dumps(content)
