"""What a run learns on: prompts, tokenizer and reward; lists of responses sampled and scored."""

import dataclasses
import functools
import hashlib
import json
import math
import statistics
from collections import Counter
from dataclasses import dataclass
from typing import Any

import tiktoken
import torch
from torch import Tensor, nn

import data
import model as models
from data import DataError, Example, Task
from harness.config import Config, ConfigError, learn_from_singles, why_lists
from harness.pretrained import Pretrained, read_folder
from harness.reward import task_of_files
from objectives import OBJECTIVES


@dataclass
class World:
    """What a run works on: tokens, lists of reference and rounds, evaluation prompts, a task."""

    enc: tiktoken.Encoding
    task: Task | None
    allowed: Tensor | None  # [max_response, V] bool, where a task allows some tokens only
    max_response: int
    ranks: dict | None = None  # {token: rank} of an enc that was made here
    init: Pretrained | None = None  # what the reference starts from, unless it is fresh
    logged: list[Example] = ()  # the reference is trained on
    train: list[Example] = ()  # prompts of a task that the policy reads first, to look at it there
    # Of a task the prompts of each round, with --evolve 0 logged lists; of files, their lists.
    rounds: list[list[Example]] = ()
    heldout: list[Example] = ()  # held-out lists of a file, or prompts of a task
    ood: list[Example] = ()  # prompts about subjects never trained on
    fingerprint: str = ""  # sha256 over what the reference learns from, and a file's held-out lists
    rounds_fingerprint: str = ""  # sha256 over what the rounds are handed


MOST_LISTS = 200_000  # of a task, in memory for the reference; beyond that it reads some again


def make_world(c: Config) -> World:
    """Task or files, tokenizer, tokenised lists. Writes nothing, so bad data leave nothing behind.

    Raises: DataError, ConfigError.
    """
    task, source = None, ""
    if c.data:
        records, heldout = load_files(c)
        rounds, first = [records], []
        if c.reward:
            task, source = task_of_files(c, records, heldout)
        if c.evolve:
            parts = round_prompts(c, 0, len(task.train))
            rounds = [unanswered(task.prompts("train", start, n)) for start, n in parts]
    else:
        task, heldout = data.make_task(c.task, c.seed), []
        # First what the reference reads, each list once; then what each round does.
        records = task.logged(0, min(c.reference_steps * c.reference_batch, MOST_LISTS))
        rounds = [
            task.logged(start, n) if not c.evolve else unanswered(task.prompts("train", start, n))
            for start, n in round_prompts(c, len(records), len(task.train))
        ]
        first = task.prompts("train", len(records), min(1000, len(task.train)))

    # The tokenizer: of --init, tiktoken's own, the task's words, or a BPE of the run's own text.
    ranks, init = None, read_folder(c.init) if c.init else None
    if init:
        enc, ranks = init.encoding(), init.ranks()
        if not c.resume:
            init.weights()  # the reference reads them again; here bad ones leave nothing behind
    elif c.tokenizer == "gpt2":
        enc = data.gpt2_encoding()
    elif task and task.vocabulary:
        ranks = data.word_ranks(task.vocabulary)
    else:
        some = records if c.data else task.logged(0, 1000)
        texts = (t for r in some for t in [r["prompt"], *(" " + y for y in r["responses"])])
        ranks = data.train_bpe(texts, c.vocab_size)
    enc = data.encoding(ranks) if ranks else enc
    if task and task.words and ranks != data.word_ranks(task.vocabulary):
        way = "--init takes a run on it" if init else "leave --tokenizer at bpe"
        raise ConfigError(f"--task {c.task} has its own fixed vocabulary: {way}")
    if task and task.words and c.max_response < task.max_response:
        raise ConfigError(
            f"--task {c.task} needs --max-response {task.max_response}, got {c.max_response}"
        )

    def tokens(records, say=lambda line: None):
        return data.tokenize(records, enc, c.max_prompt, c.max_response, say)

    longest = min(c.max_response, task.max_response) if task else c.max_response
    allowed = data.allowed_tokens(task, enc, longest, init.config.vocab_size if init else 0)
    logged = tokens(records, print) if c.data else tokens(records)
    if c.data and not c.reward:
        check_lists(c, records, logged)
        if line := softmax_sees(c, logged):
            print(line)
    texts = [records, heldout]
    if init:  # how a text is read, which no option says
        texts += [str(init.config), getattr(enc, "text", str(ranks))]
    return World(
        enc=enc,
        ranks=ranks,
        task=task,
        logged=logged,
        train=tokens(unanswered(first)),
        rounds=[logged if lists is records else tokens(lists) for lists in rounds],
        heldout=tokens(unanswered(task.heldout) if task else heldout),
        ood=tokens(unanswered(task.ood)) if task else [],
        init=init,
        allowed=None if allowed is None else allowed.to(c.device),
        max_response=longest,
        fingerprint=hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
        rounds_fingerprint=hashlib.sha256((json.dumps(rounds) + source).encode()).hexdigest(),
    )


def unanswered(prompts: list[str]) -> list[dict]:
    """Records of prompts alone."""
    return [{"prompt": prompt, "responses": [], "rewards": []} for prompt in prompts]


def round_starts(c: Config) -> list[int]:
    """Steps done when each round begins, and at the end: round k is steps [k] + 1 to [k + 1]."""
    rounds = max(c.evolve, 1)
    return [round(k * c.steps / rounds) for k in range(rounds + 1)]


def round_prompts(c: Config, first: int, size: int) -> list[tuple[int, int]]:
    """(index of its first prompt, number) for each round: no prompt twice in a round.

    Args: first: prompts that the reference has read; size: how many there are.
    """
    if OBJECTIVES[c.objective].loss is None:
        return []
    starts, prompts = round_starts(c), []
    for steps in (end - start for start, end in zip(starts, starts[1:])):
        n = -(-steps * c.batch_size // c.iterate)  # that one pass reads
        prompts.append((first, min(n, size)))
        first += n
    return prompts


def load_files(c: Config) -> tuple[list[dict], list[dict]]:
    """Training and held-out Records of --data and --eval-data, no prompt on both sides.

    Raises: DataError; ConfigError where the objective can't learn from them.
    """
    load = functools.partial(data.load, format=c.format, threshold=c.threshold)
    records = load(c.data, c.limit)
    if c.eval_data:
        heldout = load(c.eval_data)
    else:
        records, heldout = data.split(records)
    held = {r["prompt"] for r in heldout}
    if leaked := sum(r["prompt"] in held for r in records):
        records = [r for r in records if r["prompt"] not in held]
        print(f"{leaked} lists with a held-out prompt are left out of the training lists")
        if not records:
            raise DataError("every prompt of --data is held out, in --eval-data: give other lists")
    if not records or not heldout:
        prompts = len({r["prompt"] for r in [*records, *heldout]})
        raise DataError(
            f"{', '.join(c.data)}: {len(records)} lists to train on and {len(heldout)} held out, "
            f"expected some of both: they are of {prompts} prompts, and lists of one prompt stay "
            "on one side; give more prompts, or held-out ones with --eval-data"
        )
    reason = "" if c.reward and c.evolve else why_lists(c)
    if reason:
        if all(len(r["responses"]) < 2 for r in records):
            raise ConfigError(
                f"--objective {c.objective} {reason}, and every list here has a single response: "
                f"it can't learn (--objective {', '.join(learn_from_singles())} can)"
            )
        if all(len(set(r["rewards"][: c.candidates])) < 2 for r in records):
            raise ConfigError(
                "no list has two responses of unlike reward: there is nothing to compare, and "
                "nothing to learn"
            )
    return records, heldout


def check_lists(c: Config, records: list[dict], examples: list[Example]) -> None:
    """Say how many lists hold a response twice with unlike rewards, or, to compare, only one.

    Raises: DataError where it is more than half of them.
    """
    causes = Counter(why_alike(c, r, e) for r, e in zip(records, examples, strict=True))
    del causes[""]
    if not causes:
        return
    what = ", ".join(f"{n} {cause}" for cause, n in causes.items())
    line = (
        f"{causes.total()} of {len(examples)} lists hold a response twice with unlike rewards, or "
        f"no other: {what}"
    )
    if causes.total() > len(examples) / 2:
        way = "give each response one reward, or no list"
        if "--max-response" in causes.most_common(1)[0][0]:
            way = "give a higher --max-response"
        raise DataError(f"{', '.join(c.data)}: {line}; {way}")
    print(line)


def why_alike(c: Config, record: dict, example: Example) -> str:
    """In what way a list has nothing to tell two of its responses apart; empty where it has."""
    first: dict[tuple, int] = {}  # tokens -> the first response of them
    pair, ids = None, [tuple(tokens) for tokens in example.response_ids[: c.candidates]]
    for j, tokens in enumerate(ids):
        i = first.setdefault(tokens, j)
        if example.rewards[i] != example.rewards[j]:
            pair = i, j
    if pair is None and len(ids) > 1 and len(first) == 1 and why_lists(c):
        pair = 0, 1
    if pair is None:
        return ""
    one, other = (record["responses"][i] for i in pair)
    if one == other:
        return "the same text"
    if one.strip() == other.strip():
        return "the same but for white space"
    return f"the same in --max-response {c.max_response} tokens"


def softmax_sees(c: Config, examples: list[Example]) -> str:
    """What a softmax makes of rewards that are almost alike, or far apart, in most of the lists."""
    lists = [sorted(e.rewards[: c.candidates]) for e in examples]
    lists = [rewards for rewards in lists if rewards and rewards[0] < rewards[-1]]
    if c.reward_norm != "softmax" or not lists:
        return ""
    ranges = [rewards[-1] - rewards[0] for rewards in lists]
    typical = f"in most lists (their range is {statistics.median(ranges):.2g} in the middle one)"
    way = "--reward-norm zscore puts every list on one scale"
    if sum(x < 0.01 for x in ranges) > len(lists) / 2:
        return (
            f"rewards differ so little {typical} that their softmax is flat, and the likelihood of "
            f"the best is nearly all that is learnt: {way}"
        )
    largest = [1 / sum(math.exp(x - rewards[-1]) for x in rewards) for rewards in lists]
    if sum(x > 0.99 for x in largest) > len(lists) / 2:
        return (
            f"rewards differ so much {typical} that their softmax is one-hot, and all but the best "
            f"are alike: {way}"
        )
    return ""


# ------------------------------------------------------------------------------- lists of responses


def rng(seed: int, *names: Any, device: str = "cpu") -> torch.Generator:
    """A generator for one purpose: the seed and the names alone decide, so none need be saved."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def precision(c: Config) -> torch.autocast:
    """Autocast to bfloat16 where asked, for policy and reference alike: they agree at step 0."""
    return torch.autocast(c.device, torch.bfloat16, enabled=c.dtype == "bfloat16")


def set_numerics(c: Config) -> None:
    """Plain float32 products, and on a CPU no subnormal numbers.

    A saturated softmax sends those back through the network, and a CPU multiplies them a hundred
    times slower.
    """
    if c.device == "cpu":
        torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("highest")


def with_responses(examples: list[Example], lists: list) -> list[Example]:
    """The prompts of `examples` with other responses: token ids, not rewarded or scored yet."""
    return [
        dataclasses.replace(e, response_ids=ids, rewards=[0.0] * len(ids), ref_logps=None)
        for e, ids in zip(examples, lists, strict=True)
    ]


def prompt_batch(c: Config, world: World, examples: list[Example]) -> data.Batch:
    """A batch of the prompts alone; its one response of one token means nothing."""
    prompts = with_responses(examples, [[[0]]] * len(examples))
    return data.make_batch(prompts, world.enc.eot_token, c.device)


def sample_lists(
    c: Config,
    world: World,
    model: nn.Module,
    examples: list[Example],
    M: int,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> list[list[list[int]]]:
    """M sampled responses for the prompt of every example, as token ids: [[ids, ...], ...]."""
    lists, size = [], max(1, 512 // M)
    for start in range(0, len(examples), size):
        batch = prompt_batch(c, world, examples[start : start + size])
        prompts = batch.prompt_ids, batch.prompt_mask
        longest, allowed = world.max_response, world.allowed
        with precision(c):
            ids, mask = models.sample(
                model, *prompts, M, longest, generator, temperature, allowed=allowed
            )
        for row, lengths in zip(ids.tolist(), mask.sum(-1).tolist()):
            lists.append([response[:length] for response, length in zip(row, lengths)])
    return lists


@torch.no_grad()
def score_lists(
    c: Config, world: World, model: nn.Module, examples: list[Example]
) -> list[list[float]]:
    """log pi of every response of every example."""
    # Few responses at a time, so that their logits stay in the processor's cache; more on a GPU.
    room = 1.5e6 if c.device == "cpu" else 1e8
    most = max(1, int(room / (world.max_response * world.enc.n_vocab)))
    # The same response to a prompt is scored once; a long list in pieces, which share the work with
    # others of like size.
    pieces: list[tuple[int, list]] = []
    for index, e in enumerate(examples):
        distinct = [*dict.fromkeys(map(tuple, e.response_ids))]
        pieces += [(index, distinct[i : i + most]) for i in range(0, len(distinct), most)]
    pieces.sort(key=lambda piece: -len(piece[1]))
    known: list[dict] = [{} for _ in examples]
    while pieces:
        size = max(1, most // len(pieces[0][1]))
        some, pieces = pieces[:size], pieces[size:]
        lists = with_responses([examples[i] for i, _ in some], [own for _, own in some])
        batch = data.make_batch(lists, world.enc.eot_token, c.device)
        with precision(c):
            scores = models.response_logps(model, batch, world.allowed).tolist()
        for (index, own), row in zip(some, scores):
            known[index] |= zip(own, row)
    return [[known[i][tuple(ids)] for ids in e.response_ids] for i, e in enumerate(examples)]


def decode(world: World, ids: list[int]) -> str:
    """The text of response ids, without EOS."""
    return world.enc.decode([i for i in ids if i != world.enc.eot_token])


def reward_list(world: World, prompt: str, responses: list[list[int]]) -> list[float]:
    """The task's reward of every response to a prompt."""
    return [world.task.reward(prompt, decode(world, ids)) for ids in responses]


# ------------------------------------------------------------------------------ the pool of a round


def own_lists(c: Config, world: World) -> list[Example]:
    """The data's own lists, of each the first M responses."""
    M = c.candidates
    return [
        dataclasses.replace(e, response_ids=e.response_ids[:M], rewards=e.rewards[:M])
        for e in world.rounds[0]
    ]


def comparable(c: Config, lists: list[Example]) -> list[Example]:
    """The lists that hold a response, or two where the objective compares them."""
    lists = [e for e in lists if e.response_ids]
    if not why_lists(c):
        return lists
    whole = [e for e in lists if len(e.response_ids) > 1]
    if single := len(lists) - len(whole):
        print(
            f"{single} lists of a single response are left out: there is nothing to compare in them"
        )
    return whole


def under_other_prompts(lists: list[Example], generator: torch.Generator) -> list[Example]:
    """Every list under the prompt of another, drawn at random."""
    others = torch.randperm(len(lists), generator=generator).tolist()
    return [dataclasses.replace(e, prompt_ids=lists[i].prompt_ids) for e, i in zip(lists, others)]


def best_and_worst(example: Example) -> Example:
    """The list with the first of its best and the first of its worst responses alone.

    Where all earn the same, it is the first two, which teach nothing.
    """
    responses, rewards = example.response_ids, example.rewards
    best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
    pair = [best, worst] if best != worst else [0, 1]
    return dataclasses.replace(
        example, response_ids=[responses[i] for i in pair], rewards=[rewards[i] for i in pair]
    )


def pool_metrics(lists: list[Example]) -> dict[str, float]:
    """The share of different candidates in a list, and of lists that hold a single reward."""
    distinct = [len(set(map(tuple, e.response_ids))) / len(e.response_ids) for e in lists]
    tied = [max(e.rewards) == min(e.rewards) for e in lists]
    return {"lists/distinct": sum(distinct) / len(lists), "lists/tied": sum(tied) / len(lists)}


@dataclass
class Pool:
    """The lists of a round, visited pass after pass, each pass in a random order of its own."""

    examples: list[Example]
    round_index: int
    batch_size: int
    seed: int
    pass_index: int = -1  # the pass that `order` belongs to
    order: list[list[int]] = ()

    def batch(self, index: int) -> list[Example]:
        """The batch at this index of the round; it depends on seed, round and index alone."""
        per_pass = -(-len(self.examples) // self.batch_size)
        if index // per_pass != self.pass_index:
            self.pass_index = index // per_pass
            generator = rng(self.seed, "order", self.round_index, self.pass_index)
            self.order = data.batch_order(self.examples, self.batch_size, generator)
        return [self.examples[i] for i in self.order[index % per_pass]]


def mean_and_deviation(rewards: list[float]) -> list[float]:
    """Mean and standard deviation of rewards.

    Raises: ConfigError where they are all the same.
    """
    if max(rewards) == min(rewards):
        raise ConfigError(f"every reward is {rewards[0]}: there is nothing to learn")
    mean = sum(rewards) / len(rewards)
    return [mean, (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5]


def normalise(rewards: Any, scale: list[float] | None) -> Any:
    """Rewards (a list or a tensor) minus a mean, over a deviation; as they are without a scale."""
    mean, deviation = scale or (0.0, 1.0)
    if isinstance(rewards, list):
        return [(reward - mean) / deviation for reward in rewards]
    return (rewards - mean) / deviation


def describe_pool(
    c: Config, world: World, round_index: int, lists: list[Example], metrics: dict[str, float]
) -> str:
    """The line that says what a round trains on, and a second where most of it teaches nothing."""
    rewards = [reward for e in lists for reward in e.rewards]
    best = sum(max(e.rewards) for e in lists) / len(lists)
    units = "deviations from the first pool's mean"
    if c.reward_norm != "global":
        units = "the task's units" if world.task else "the file's units"
    name, tied = f"pool {round_index + 1}/{max(c.evolve, 1)}", metrics["lists/tied"]
    line = (
        f"{name}: {len(lists)} lists of {len(rewards) / len(lists):.1f} responses, "
        f"{metrics['lists/distinct']:.0%} different, {tied:.0%} of the lists tied; reward "
        f"{sum(rewards) / len(rewards):.3f}, best of a list {best:.3f} ({units})"
    )
    if tied > 0.5 and why_lists(c):
        line += (
            f"\n{name}: {tied:.0%} of its lists hold a single reward, and so teach nothing; more "
            "--candidates or a higher --sample-temperature would show differences"
        )
    return line
