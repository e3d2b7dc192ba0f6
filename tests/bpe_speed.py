"""How fast is data.train_bpe beside the tokenizers library? python tests/bpe_speed.py

Both learn the same number of tokens from the same texts, in turn, on one thread, with one regex for
the pre-tokens. The texts are made up: English-like is 20 MB of words of 200,000 kinds, Chinese-like
5 MB of characters of 5,000 kinds, where one text in ten has no punctuation at all; the frequency of
a kind is about one over its rank (Zipf). A table says the seconds (of the processor, which other
jobs disturb less), our time over theirs, and our time over that for half of the text. The aims: a
ratio of at most 2 for English-like text and 4 for Chinese-like, a growth of at most 2.3. The exit
status is 1 where one is missed.

    python tests/bpe_speed.py               12 rows, about 8 minutes
    python tests/bpe_speed.py --part 0.1    on a tenth of the text, where the aims don't hold
    python tests/bpe_speed.py --rounds 3    the best of three times each
"""

import argparse
import os
import random
import sys
import time
from itertools import accumulate
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import data

SIZES, GROWTH = (1_024, 8_192, 32_768), 2.3


def zipf(kinds):
    """Cumulated weights for random.choices: 1 / (rank + 2.7), Mandelbrot's form of Zipf's law."""
    return list(accumulate(1 / (rank + 2.7) for rank in range(kinds)))


def english_like(size, seed=0, kinds=200_000):
    """Texts of 1,000 made-up words each, size bytes or little more in all."""
    rng = random.Random(seed)
    onsets = "t s th w h b c m p f d n r l g st pr tr ch sh k v pl y j qu z".split()
    vowels = "e a o i u ea ou ai ee io".split()
    codas = ["", *"n r s t l d ng st nd ck m p".split()]
    parts = [(part, zipf(len(part))) for part in (onsets, vowels, codas)]
    words = {}  # the first ones, the most frequent, are short
    while len(words) < kinds:
        syllables = 1
        while syllables < 4 and len(words) > 500 and rng.random() < 0.6:
            syllables += 1
        draws = [rng.choices(part, cum_weights=w, k=syllables) for part, w in parts]
        words["".join(map("".join, zip(*draws)))] = None
    words, weights, texts, total = list(words), zipf(kinds), [], 0
    ends = ["", ".", ",", "\n", "?"], list(accumulate([0.9, 0.045, 0.045, 0.005, 0.005]))
    while total < size:
        drawn = rng.choices(words, cum_weights=weights, k=1000)
        marks = rng.choices(ends[0], cum_weights=ends[1], k=1000)
        texts.append(" ".join(map("".join, zip(drawn, marks))))
        total += len(texts[-1])
    return texts


def chinese_like(size, seed=0, kinds=5_000):
    """Texts of 3,000 characters each, size bytes or little more in all; no spaces."""
    rng = random.Random(seed)
    characters = [chr(0x4E00 + i) for i in rng.sample(range(20_000), kinds)]
    weights, texts, total = zipf(kinds), [], 0
    while total < size:
        text = rng.choices(characters, cum_weights=weights, k=3000)
        if len(texts) % 10:
            for i in range(rng.randint(5, 20), len(text), 12):
                text[i] = rng.choice("，，，，，。。。、？")
        texts.append("".join(text))
        total += len(texts[-1].encode())
    return texts


# name, made by, MB, the most that train_bpe may take of the time of the tokenizers library
TEXTS = (("English-like", english_like, 20, 2), ("Chinese-like", chinese_like, 5, 4))


def train_ours(texts, vocab_size):
    data.train_bpe(texts, vocab_size, max_bytes=10**12)


def train_theirs(texts, vocab_size):
    """Pre-tokens of data.SPLIT, all 256 bytes at first, no pair that occurs once."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(data.SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # train_bpe leaves one for EOS
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)


def best_seconds(texts, vocab_size, rounds):
    """The least processor time of ours and of theirs, in turn."""
    least = {train_ours: float("inf"), train_theirs: float("inf")}
    for _ in range(rounds):
        for train in least:
            began = time.process_time()
            train(texts, vocab_size)
            least[train] = min(least[train], time.process_time() - began)
    return least.values()


def main(part: float = 1.0, rounds: int = 1, sizes=SIZES, texts=TEXTS) -> int:
    """Print the table, a row at a time. Returns: the exit status."""
    train_theirs(["warm up"], 300)  # the import is not timed
    print("text            MB   tokens  train_bpe  tokenizers  ratio (aim)  growth (aim)")
    missed = 0
    for name, make, megabytes, aim in texts:
        whole = make(2 * part * megabytes * 1e6)
        half = whole[: len(whole) // 2]
        for vocab_size in sizes:
            before = None
            for text, size in ((half, part * megabytes), (whole, 2 * part * megabytes)):
                ours, theirs = best_seconds(text, vocab_size, rounds)
                row = f"{name} {size:5.1f} {vocab_size:8,} {ours:8.2f} s {theirs:9.2f} s"
                row += f" {ours / theirs:8.2f} ({aim})"
                missed += ours > aim * theirs
                if before:
                    row += f"    {ours / before:5.2f} ({GROWTH})"
                    missed += ours > GROWTH * before
                print(row, flush=True)
                before = ours
    return int(missed > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", type=float, default=1.0, help="of the text (default: all)")
    parser.add_argument("--rounds", type=int, default=1, help="the best of so many (default: 1)")
    options = parser.parse_args()
    os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # read at import
    sys.exit(main(options.part, options.rounds))
