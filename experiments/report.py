"""Every table on one page: `python -m experiments.report` writes results/README.md.

A result is a file results/NAME.json and a row of SECTIONS: its title and how to read it. The
numbers are the file's, and so are the command that made them and its date.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from experiments import bench, budget, compare, copa, exact, peers, tables

RESULTS = Path(__file__).parent.parent / "results"


class Section(NamedTuple):
    """What the page says of a result: title, how to read it, and what makes its table."""

    title: str
    reading: str
    table: Callable[[Any], str] | None = None  # None: a table of experiments.tables


def copa_tables(results: dict[str, dict]) -> str:
    """A table for each setting."""
    return "\n\n".join(f"`{row}`\n\n{copa.table(own)}" for row, own in results.items())


SECTIONS = {
    "compare": Section(
        "Every objective offline, side by side: dialogue, held-out prompts, 3 seeds",
        "LIRE at T 16 and 32 earns most and spends 1.7 to 2.3 nats on it. PRO, RWR and RRHF lie "
        "nearest to the optimum (0.65 to 0.72), DRO at tau 0.5 at 0.64. LIRE at T 8, DRO-P at tau "
        "0.2 and DPO at beta 0.2 go beyond what any optimum spends in some seeds. DRO's own "
        "default is another setting: 1,600 updates, two answers of many prompts. Seconds were "
        "measured beside other work.\n\n![Every objective on the reward-KL plane](compare.png)",
        compare.table,
    ),
    "lire": Section(
        "LIRE on dialogue: rounds, the SFT term, the authors' T, the mean score, 3 seeds",
        "Rounds are what it lives on: 8.1 with ten, 6.7 offline, where 14 % of the answers are "
        "broken, as many as of the reference's. Without the SFT term every answer is broken at "
        "this rate, in rounds and offline. Trained under other prompts than those that earned the "
        "rewards, too: who names another subject earns 0. The default's answers earn 0.00 under "
        "another prompt (shuffled_policy_reward): the gain comes from reading it. The mean score "
        "at T 0.5 does as well as the sum.",
    ),
    "candidates": Section(
        "LIRE with 2, 4, 8 and 16 candidates a prompt, dialogue, 3 seeds",
        "With two, it earns 0.0, 3.9 and 6.5, and 99, 47 and 19 % of the answers are broken. T and "
        "the rate are those that were found with eight. Four come near to eight, and sixteen earn "
        "no more, in as many updates.",
    ),
    "summary": Section(
        "LIRE on the second world, summary, 3 seeds",
        "The policy covers more facts (1.9, the reference 1.4) and invents fewer (0.3, 0.6), in "
        "fewer words, on new subjects too. It stays behind the best of 8 answers of the reference "
        "(1.2 against 2.0). Trained on shuffled prompts it covers nothing.",
    ),
    "dro": Section(
        "DRO-V offline: GPT, T5, and the task's own logged answers, dialogue, 5 seeds",
        "On samples of the reference a GPT makes 88 % of the optimum's gain and spends what pi* "
        "spends. A T5 (two layers in encoder and decoder each) makes 77 % and spends less than "
        "pi*; its reference is worse too: 21 % of its answers are broken, 14 % of the GPT's. At "
        "twice the rate it made 72 % (one seed).\n\n"
        "On the task's logged answers nothing is gained: three of five seeds end below the "
        "reference, at 6.5 to 8.5 nats, though the answers are fitted well (log.jsonl: "
        "residual/rms .3, rewards/correlation .95). Held-out reward is at its best after 50 of "
        "the 1,600 updates (5.3 to 5.8) and falls while the residual does. 5 % of the logged "
        "answers are broken and 44 % of this policy's. A guess, not tested: residuals of logged "
        "answers tie V to their own log-ratios alone, so V can be too high (it ends at .7 to 1.0, "
        "on samples of the reference at .4 to .5) where the mass goes to answers that nobody "
        "logged.\n\n"
        "Tried for the GPT, one seed each, training prompts that no run reads; the default ends "
        ".175 nats from pi*. The mean of the weights over the last 5 to 50 % of the updates: .17 "
        "to .19. Every response read once: .16, and at a rate of 7e-4 too, in six minutes and not "
        "five. Four passes: .18. Batches of 32, 3,000 updates: .17. A shared network: .41. What "
        "helped is many updates on many prompts: on held-out ones 250 updates end .37 from pi* "
        "(next table), the default .15.",
    ),
    "dro-ablations": Section(
        "DRO-V's tau and value network, offline, 250 updates, dialogue, 3 seeds",
        "A small tau earns more and strays further: at 0.2 the policy spends 3.6 nats where pi* "
        "spends 2.2. A V of its own follows V* over the prompts (correlation 0.89), on the "
        "policy's states it does not (-0.03), and is no better than one number for a batch. The "
        "policy hardly depends on it: 0.37 nats from the optimum with a V of its own, 0.42 to "
        "0.44 without, at more KL and more reward. The paper found shared networks to be worse; "
        "here they are a little farther from the optimum.",
    ),
    "budget": Section(
        "How much of the optimum do N rewards buy? Offline, dialogue, 3 seeds",
        "With 10,000 responses DRO and KTO make 57 to 61 % of the optimum's gain and RWR 65 %; "
        "with 30,000 RWR is still ahead (79 %, DRO 74 to 77 %), with 100,000, each read once, no "
        "longer (83 %, DRO 84 to 85 %). KTO ends at 71 to 73 %. LIRE earns most from 10,000 on, "
        "at 2.7 to 4.6 nats; with 1,000 and 3,000 it breaks 26 and 20 % of its answers, of the "
        "reference's 13 to 14 % are broken. DPO goes to 3 to 20 nats, and a fifth of its answers "
        "are broken. DRO does with single responses what it does with lists; KTO does a little "
        "better with lists below 100,000. Passes were chosen by reward alone, whatever the KL.\n\n"
        "What holds DRO back with little data: it reads few responses many times, and makes few "
        "updates. From the table of the tries, with single responses (with lists in brackets): "
        "after 234 updates it earns 5.2 (5.6) with 3,000 read ten times, 6.0 (6.1) with 10,000 "
        "read three times, 6.1 (6.1) with 30,000 read once. Others do alike: RWR earns 5.2, 6.1 "
        "and 6.1. After 700 to 780 it earns 6.2 (6.1), 6.6 (6.6) and 6.6 (6.6) with 10,000, "
        "30,000 and 100,000. In as many updates, ten passes earn less than fewer passes over more "
        "responses, and three do not. From 234 to 781 updates on new responses it gains half a "
        "mark. From the table of where the probability goes: with 10,000 responses read ten "
        "times, the reference's broken answers lose 3 nats, but other broken answers, which "
        "gained 4, are 11 to 12 % of the policy's. With 100,000 they are 2 %, the optimum has 0.3 "
        "%, and unbroken answers earn 6.8 where the optimum's earn 7.0 to 7.1. RWR, which has no "
        "squared loss, leaves as much: 4 % are broken, the others earn 7.0 of 7.2.\n\n"
        "![How much of the optimum N rewards buy](budget.png)",
        budget.table,
    ),
    "grid": Section(
        "The grid that the defaults come from: learning rates and strengths, training prompts, one "
        "seed",
        "Everyone begins with the same five rows and climbs on. A row counts as much as it earns "
        "or as the row of twice its rate does, whichever is less: so a default does not stand "
        "beside an edge. The row with * counts most, and is the default. Eight of eleven have a "
        "row that earns more, most of them near an edge.",
        compare.table,
    ),
    "exact": Section(
        "DRO-V against the exact optimum, real networks, tiny",
        "GPT and T5 come to pi* for every tau, with one prompt and, the GPT in four times the "
        "steps, with four; the coefficient 1/2 that the box of Algorithm 1 prints ends elsewhere "
        "(tau 0.5) or diverges (tau 5).",
        exact.table,
    ),
    "copa": Section(
        "Real ratings: COPA-SSE, 1,000 prompts with 6,579 rated explanations, 5 folds",
        'By its mean log-prob LIRE beats the reference clearly (+0.60) and not the rule "pick the '
        'longest" (-0.02): raters liked long explanations. Brackets are 95 % bootstrap intervals '
        "over prompts, differences are paired.",
        copa_tables,
    ),
    "bench": Section(
        "A prompt is read once: an update with M responses, against the prompt repeated M times",
        "87 to 96 % of what the token ratio promises is reached and, where repeated prompts no "
        "longer fit the caches, more than all of it.",
        bench.table,
    ),
    "bench-hf": Section(
        "The same update by transformers: the prompt repeated, logits of every token",
        "Small models gain more than operations are saved. The 124 M size gains less with one "
        "prompt, where reading 124 M weights and writing their gradients is much of the work, and "
        "more with four (gpt2-x4), which share that.",
        peers.table,
    ),
    "bench-trl": Section(
        "The same step of DPO by TRL's DPOTrainer, pairs, reference log-probs made beforehand",
        "Tokens alone would save 1.5.",
        peers.table,
    ),
}


def report() -> str:
    """The page."""
    lines = [
        "# Results",
        "",
        "Written by `python -m experiments.report` from the files beside it. Two CPU cores, torch "
        "2.13.0. Rewards are the task's own, of held-out prompts unless said; ± is the standard "
        "deviation over seeds, - a number that would mean nothing (docs/metrics.md). (1 of 3) says "
        "how many seeds have one: for an efficiency these may be the seeds of most KL, so it "
        "should not be compared with other rows.",
        "",
    ]
    for name, section in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        content = json.loads(path.read_text())
        make = section.table or functools.partial(tables.table, name)
        lines += [
            f"## {section.title}",
            "",
            f"`{content['command']}`, {content['date']}. {section.reading}",
            "",
            make(content["results"]),
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    path = RESULTS / "README.md"
    path.write_text(report())
    print(f"written to {path}")
