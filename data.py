"""Lists of responses as tensors: load, tokenise, batch; and a small byte-pair encoding.

load(["lists.jsonl"])      -> Records   {"prompt": str, "responses": [str, ...],
                                        "rewards": [float, ...]}
make_task("dialogue")      -> Task      a synthetic world: prompts, logged Records, an exact reward
train_bpe(texts, 512)      -> ranks     a byte-pair encoding, used through tiktoken (`encoding`)
tokenize(records, enc)     -> Examples  token ids, EOS appended
make_batch(examples, eos)  -> Batch     padded tensors; masks are carried, never guessed from values
"""

import base64
import hashlib
import os
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path

import tiktoken
import torch
from torch import Tensor

from files import load
from records import DataError, short
from tasks import Task, make_task

__all__ = ["DataError", "Task", "load", "make_task"]  # handed on: whoever reads data asks here

EOS = "<|endoftext|>"  # inside a text this is ordinary text: only `encode_ordinary` is used


def split(records: list[dict], share: float = 0.1) -> tuple[list[dict], list[dict]]:
    """Train and held-out lists: a hash of its text keeps a prompt always on the same side."""

    def held_out(record):
        digest = hashlib.sha256(record["prompt"].encode("utf-8", "replace")).hexdigest()
        return int(digest[:8], 16) < share * 2**32

    sides = [held_out(record) for record in records]
    return (
        [record for record, held in zip(records, sides) if not held],
        [record for record, held in zip(records, sides) if held],
    )


# ---------------------------------------------------------------------------------------- tokenizer

# Words with the space before them, runs of punctuation, white space: no character is left out.
SPLIT = r" ?[^\W_]+| ?(?:[^\w\s]|_)+|\s+(?!\S)|\s+"

BYTES = [bytes([b]) for b in range(256)]
GAP = b""  # stands between two words, and inside of a token


def lay_out(texts: Iterable[str], max_bytes: int) -> tuple[list[bytes], list[int]]:
    """The words (SPLIT), each once, byte by byte with a GAP around; at each place a word's count.

    >>> lay_out(["no no"], max_bytes=5)
    ([b'', b'n', b'o', b'', b' ', b'n', b'o', b''], [0, 1, 1, 1, 1, 1, 1, 1])
    """
    counts, size = Counter(), 0
    for text in texts:
        size += len(text.encode("utf-8", "replace"))
        if size > max_bytes:
            break
        counts.update(re.findall(SPLIT, text))
    tokens, weights = [GAP], [0]
    for word, count in counts.items():
        tokens += [BYTES[b] for b in word.encode("utf-8", "replace")]
        tokens.append(GAP)
        weights += [count] * (len(tokens) - len(weights))
    return tokens, weights


def new_places() -> array:
    """Where a pair begins: an array takes a fifth of a list's memory."""
    return array("q")


def join(
    tokens: list[bytes], pair: tuple[bytes, bytes], places: Iterable[int]
) -> dict[tuple[bytes, bytes], array]:
    """Make a pair one token, from left to right, in place. Returns: {new pair: its places}.

    A token stands at the places of its first and its last byte: its neighbours are one step away,
    and a join takes no longer in a longer word.

    >>> tokens = [GAP, b"th", b"th", b"e", b"n", GAP]
    >>> dict(join(tokens, (b"th", b"e"), [1])), tokens
    ({(b'the', b'n'): array('q', [1])}, [b'', b'the', b'', b'the', b'n', b''])
    """
    left, token = pair[0], pair[0] + pair[1]
    middle, length, made = len(left), len(token), defaultdict(new_places)
    for i in places:
        if tokens[i] != left:  # "aaa" has two places: the join at the first takes the second
            continue
        before, after = tokens[i - 1], tokens[i + length]
        tokens[i + middle - 1] = tokens[i + middle] = GAP
        tokens[i] = tokens[i + length - 1] = token
        if before:
            made[before, token].append(i - len(before))
        if after:
            made[token, after].append(i)
    return made


def train_bpe(
    texts: Iterable[str], vocab_size: int, max_bytes: int = 20_000_000
) -> dict[bytes, int]:
    """Learn a byte-pair encoding: start from the 256 bytes, join the most frequent pair, and again.

    Ties go to the pair that is smaller as (bytes, bytes). Stops early where no pair occurs twice.
    A join makes pairs with its new token alone, and other pairs only lose places: a count in the
    heap is right or too high, and is set right once it comes to the top. Memory: about 50 bytes
    for each byte of the different words.

    Args: texts; vocab_size: tokens in all, EOS included; max_bytes: text read at most.
    Returns: {token: rank}, at most vocab_size - 1 entries: the last id is left to EOS.
    Raises: ValueError under 257.

    >>> ranks = train_bpe(["aaab aaab"], 259)
    >>> [token for token, rank in ranks.items() if rank >= 256]
    [b'aa', b'ab']
    """
    if vocab_size < 257:
        raise ValueError(
            f"vocab_size {vocab_size}: a byte-level vocabulary needs at least 256 bytes and EOS"
        )
    tokens, weights = lay_out(texts, max_bytes)
    ranks = {byte: rank for rank, byte in enumerate(BYTES)}
    heap, pairs = [], defaultdict(new_places)
    for i, pair in enumerate(zip(tokens, tokens[1:])):
        if GAP not in pair:
            pairs[pair].append(i)

    def push(found):
        for pair, places in found.items():
            count = sum([weights[i] for i in places])
            if count > 1:
                heappush(heap, (-count, pair, places))

    push(pairs)
    while heap and len(ranks) < vocab_size - 1:
        count, pair, places = heappop(heap)
        left, right = pair
        middle = len(left)
        places = [i for i in places if tokens[i] == left and tokens[i + middle] == right]
        if sum([weights[i] for i in places]) < -count:  # other joins took some of its places
            push({pair: places})
        else:
            ranks[left + right] = len(ranks)  # new: the same bytes are never joined in two ways
            push(join(tokens, pair, places))
    return ranks


def word_ranks(words: list[str]) -> dict[bytes, int]:
    """A fixed vocabulary: the 256 bytes, then each of these words as one token."""
    tokens = BYTES + [word.encode() for word in words if len(word) > 1]
    return {token: rank for rank, token in enumerate(tokens)}


def encoding(ranks: dict[bytes, int], name: str = "small") -> tiktoken.Encoding:
    """A tiktoken.Encoding of these ranks with EOS as the last id (`.eot_token`)."""
    return tiktoken.Encoding(
        name,
        pat_str=SPLIT,
        mergeable_ranks=ranks,
        special_tokens={EOS: len(ranks)},
        explicit_n_vocab=len(ranks) + 1,
    )


def save_ranks(ranks: dict[bytes, int], path: str | Path) -> None:
    """One `base64 rank` a line, tiktoken's own plain format."""
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    Path(path).write_text("".join(lines))


def load_ranks(path: str | Path) -> dict[bytes, int]:
    """Read `save_ranks`' file (tiktoken's own reader may serve a stale copy of a local file)."""
    rows = [line.split() for line in Path(path).read_text().splitlines()]
    return {base64.b64decode(token): int(rank) for token, rank in rows}


def gpt2_encoding() -> tiktoken.Encoding:
    """GPT-2's own encoding; tiktoken downloads it on first use.

    Raises: DataError where that fails, with the way out.
    """
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as e:  # requests' errors, without importing requests
        folder = os.environ.get("TIKTOKEN_CACHE_DIR", "not set")
        raise DataError(
            "--tokenizer gpt2: tiktoken could not download GPT-2's vocabulary "
            f"({type(e).__name__}). Run it once with a network, or set TIKTOKEN_CACHE_DIR "
            f"(now {folder}) to a folder that holds it."
        ) from None


def allowed_tokens(
    task: Task | None, enc: tiktoken.Encoding, max_response: int, vocab_size: int = 0
) -> Tensor | None:
    """[max_response, V] bool: the tokens a response may have at each place; None: all.

    For a task of few words: a word at first, then a word or EOS, and EOS alone at the last place.
    For a model whose vocabulary is larger than its tokenizer's: the tokens of the tokenizer.
    """
    if task and task.words:
        words = [enc.encode_single_token(" " + word) for word in task.words]
        mask = torch.zeros(max_response, enc.n_vocab, dtype=torch.bool)
        mask[:-1, words] = True
        mask[1:, enc.eot_token] = True
        return mask
    if vocab_size > enc.n_vocab:
        return (torch.arange(vocab_size) < enc.n_vocab).expand(max_response, vocab_size)
    return None


# ------------------------------------------------------------------------------------------ batches


@dataclass
class Example:
    """A tokenised list: EOS ends a response unless it was truncated."""

    prompt: str
    prompt_ids: list[int]
    response_ids: list[list[int]]
    rewards: list[float]
    ref_logps: list[float] | None = None  # under the reference, once the list is part of a pool


END_MARKS = (EOS, "</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>")  # of other tokenizers


def encode_prompt(enc: tiktoken.Encoding, prompt: str) -> list[int]:
    """The ids of a prompt; for a T5 from elsewhere they end in EOS, as it is used to.

    Raises: DataError where there are none: some tokenizers drop white space and control characters.
    """
    ids = enc.encode_ordinary(prompt) + getattr(enc, "prompt_end", [])
    if not ids:
        raise DataError(f"the prompt {short(repr(prompt))} has no token in this tokenizer")
    return ids


def tokenize(
    records: list[dict],
    enc: tiktoken.Encoding,
    max_prompt: int = 0,
    max_response: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> list[Example]:
    """Records to Examples. Prompt and response are encoded apart and joined as ids.

    Where neither side has white space at the seam, a space is put before the response. A long
    prompt loses its beginning (at least one token stays), a long response its end and its EOS.

    Args: records; enc; max_prompt, max_response: tokens kept (0: all), EOS included; say: takes
        lines of news, such as the shares that were truncated.
    """
    examples, spaced, long_prompts, long_responses, total = [], 0, 0, 0, 0
    doubled, ended, eos = 0, Counter(), enc.eot_token
    for record in records:
        prompt_ids = encode_prompt(enc, record["prompt"])
        if max_prompt and len(prompt_ids) > max_prompt:
            prompt_ids, long_prompts = prompt_ids[-max_prompt:], long_prompts + 1
        response_ids = []
        for text in record["responses"]:
            if text.startswith(" ") and record["prompt"].endswith(" "):
                doubled += 1
            if text.endswith(END_MARKS):
                ended[next(mark for mark in END_MARKS if text.endswith(mark))] += 1
            if not record["prompt"][-1:].isspace() and not text[:1].isspace():
                text, spaced = " " + text, spaced + 1
            ids = enc.encode_ordinary(text)
            ids.append(eos)
            if max_response and len(ids) > max_response:
                ids, long_responses = ids[:max_response], long_responses + 1
            response_ids.append(ids)
        total += len(response_ids)
        examples.append(Example(record["prompt"], prompt_ids, response_ids, record["rewards"]))
    if spaced:
        say(f"a space was put between prompt and response in {spaced} of {total} responses")
    if doubled:
        say(f"{doubled} of {total} responses begin with a space after a prompt that ends in one")
    for mark, n in ended.items():
        say(
            f"{n} of {total} responses end in {mark}, which is ordinary text here: take it off, as "
            "each response gets an end of its own"
        )
    if long_prompts or long_responses:
        say(
            f"truncated: {long_prompts / len(records):.1%} of the prompts, "
            f"{long_responses / max(total, 1):.1%} of the responses"
        )
    return examples


@dataclass
class Batch:
    """B lists, padded to the batch's own longest prompt, list and response. Masks: True is real."""

    prompt_ids: Tensor  # [B, S]
    prompt_mask: Tensor  # [B, S]
    response_ids: Tensor  # [B, M, R]
    response_mask: Tensor  # [B, M, R], EOS included
    candidate_mask: Tensor  # [B, M]
    rewards: Tensor  # [B, M]
    ref_logps: Tensor | None = None  # [B, M]


def make_batch(examples: list[Example], eos: int, device: str | torch.device = "cpu") -> Batch:
    """Pad Examples to tensors. Padding ids are EOS, padding rewards and ref_logps 0.

    >>> one = Example("", [1, 2], [[3, 0], [4]], [1.0, 2.0])
    >>> batch = make_batch([one, Example("", [5], [[6, 0]], [3.0])], eos=0)
    >>> batch.response_ids.shape, batch.candidate_mask.tolist()
    (torch.Size([2, 2, 2]), [[True, True], [True, False]])
    """

    def padded(row, length, filler):
        return [*row, *[filler] * (length - len(row))]

    M = max(len(e.response_ids) for e in examples)
    S = max(len(e.prompt_ids) for e in examples)
    R = max(len(ids) for e in examples for ids in e.response_ids)
    prompt_lengths = torch.tensor([len(e.prompt_ids) for e in examples])  # [B]
    lists = [padded(e.response_ids, M, []) for e in examples]
    lengths = torch.tensor([[len(ids) for ids in row] for row in lists])  # [B, M]
    response_mask = torch.arange(R) < lengths[..., None]  # [B, M, R]
    ref_logps = None
    if all(e.ref_logps is not None for e in examples):
        ref_logps = torch.tensor([padded(e.ref_logps, M, 0.0) for e in examples])
    batch = Batch(
        prompt_ids=torch.tensor([padded(e.prompt_ids, S, eos) for e in examples]),
        prompt_mask=torch.arange(S) < prompt_lengths[:, None],
        response_ids=torch.tensor([[padded(y, R, eos) for y in row] for row in lists]),
        response_mask=response_mask,
        candidate_mask=lengths > 0,
        rewards=torch.tensor([padded(e.rewards, M, 0.0) for e in examples]),
        ref_logps=ref_logps,
    )
    if torch.device(device).type == "cpu":
        return batch
    # From pinned memory a GPU copies by itself: the CPU waits neither for it nor for its work.
    tensors = {name: x.pin_memory() for name, x in vars(batch).items() if x is not None}
    return Batch(**{name: x.to(device, non_blocking=True) for name, x in tensors.items()})


def batch_order(
    examples: list[Example], batch_size: int, generator: torch.Generator
) -> list[list[int]]:
    """One epoch: indices of the batches, in random order. Lists of like length share a batch.

    Every example stands in exactly one batch; the last and smaller one is kept. Buckets are runs of
    8 batches of the shuffled data, sorted by length, so the order stays random among like lengths.
    """
    order = torch.randperm(len(examples), generator=generator).tolist()
    longest = [len(e.prompt_ids) + max(map(len, e.response_ids)) for e in examples]
    batches = []
    for start in range(0, len(order), 8 * batch_size):
        bucket = sorted(order[start : start + 8 * batch_size], key=lambda index: longest[index])
        batches += [bucket[i : i + batch_size] for i in range(0, len(bucket), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]
