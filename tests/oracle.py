"""The formulas once more, in float64 numpy, written from the papers.

The judge of lire.py, dro.py, baselines.py and data.py. Everything works on one list at a time
(logps, rewards: [M]), so no mask can be forgotten here.
"""

import itertools
import re
from collections import Counter

import numpy as np


def softmax(x):
    odds = np.exp(x - np.max(x))
    return odds / odds.sum()


# LIRE (arXiv 2405.13516)


def candidate_probs(logps, T):
    """Eq. 4."""
    return softmax(np.asarray(logps, float) / T)


def transform_rewards(rewards, how):
    rewards = np.asarray(rewards, float)
    if how == "softmax":
        return softmax(rewards)
    if how == "zscore":
        if np.ptp(rewards) == 0:
            return np.zeros_like(rewards)
        return (rewards - np.mean(rewards)) / np.std(rewards)
    return rewards


def lire_loss(logps, R, T):
    """Eq. 5."""
    return -np.dot(candidate_probs(logps, T), R)


def lire_grad(logps, R, T):
    """d loss / d logps_j = -(1/T) P_j (R_j - sum_m P_m R_m)."""
    P = candidate_probs(logps, T)
    return np.array([-(P[j] / T) * (R[j] - np.dot(P, R)) for j in range(len(P))])


def sft_loss(logps, lengths, rewards):
    """Mean negative log-likelihood of a token of the first best-rewarded response."""
    best = next(j for j in range(len(rewards)) if rewards[j] == max(rewards))
    return -logps[best] / lengths[best]


def mrt_risk(probs, risks, alpha):
    """Minimum risk training (Shen et al. 2016): expected risk under Q.

    Q_j = p_j^alpha / sum_m p_m^alpha
    """
    Q = np.asarray(probs, float) ** alpha
    return np.dot(Q / Q.sum(), risks)


def finite_differences(function, x, step=1e-5):
    """Central differences of a scalar function at x."""
    x = np.asarray(x, float)
    moves = [step * unit for unit in np.eye(len(x))]
    return np.array([(function(x + move) - function(x - move)) / (2 * step) for move in moves])


# DRO (arXiv 2405.19107): the reference is given as probabilities over an enumerated set


def optimal_value(ref, rewards, tau):
    """V* = tau log E_ref exp(r / tau)."""
    top = np.max(rewards)
    return top + tau * np.log(np.dot(ref, np.exp((np.asarray(rewards, float) - top) / tau)))


def optimal_policy(ref, rewards, tau):
    """Eq. 2."""
    advantages = np.asarray(rewards, float) - optimal_value(ref, rewards, tau)
    return np.asarray(ref) * np.exp(advantages / tau)


def tilt(ref, rewards, tau):
    """The same policy without V*: reweight and normalise."""
    return softmax(np.log(ref) + np.asarray(rewards, float) / tau)


def dro_loss(logps, ref, rewards, V, tau):
    """Eq. 4, response by response."""
    residuals = [rewards[i] - V[i] - tau * (logps[i] - ref[i]) for i in range(len(logps))]
    return np.array([0.5 * residual**2 for residual in residuals])


def dro_p_loss(logps, ref, rewards, tau):
    """Appendix B: half the mean squared distance of two residuals of the batch, over two."""
    residuals = [rewards[i] - tau * (logps[i] - ref[i]) for i in range(len(logps))]
    return np.mean([(a - b) ** 2 for a in residuals for b in residuals]) / 4


def kto_loss(ratios, desirable, mismatched, beta):
    """Arithmetic on one response at a time; ratios, mismatched: log-ratios."""
    z = max(0.0, beta * np.mean(mismatched))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    return np.array(
        [
            1 - sigmoid(beta * x - z) if good else 1 - sigmoid(z - beta * x)
            for x, good in zip(ratios, desirable)
        ]
    )


def dpo_loss(chosen, rejected, beta):
    """One pair of log-ratios."""
    return np.log(1 + np.exp(-beta * (chosen - rejected)))


def ipo_loss(chosen, rejected, beta):
    return (chosen - rejected - 0.5 / beta) ** 2


def slic_loss(chosen, rejected, delta):
    """One pair of log-probabilities."""
    return max(0.0, delta - chosen + rejected)


def ranked(rewards):
    """Indices from best to worst, equal ones as they stand."""
    return sorted(range(len(rewards)), key=lambda index: -rewards[index])


def plackett_luce_loss(ratios, rewards, beta):
    """The best is drawn first, then the best of the rest, and so on.

    Minus the log of the product of these odds.
    """
    order, likelihood = ranked(rewards), 1.0
    while order:
        odds = [np.exp(beta * ratios[index]) for index in order]
        likelihood *= odds[0] / sum(odds)
        order = order[1:]
    return -np.log(likelihood)


def rrhf_loss(logps, lengths, rewards):
    scores = np.asarray(logps, float) / np.asarray(lengths)
    pairs = [(i, j) for i in range(len(rewards)) for j in range(len(rewards))]
    return sum(max(0.0, scores[i] - scores[j]) for i, j in pairs if rewards[i] < rewards[j])


def pro_loss(logps, lengths, rewards):
    order, loss = ranked(rewards), 0.0
    scores = (np.asarray(logps, float) / np.asarray(lengths))[order]
    rewards = np.asarray(rewards, float)[order]
    for k in range(len(rewards) - 1):
        worse = range(k + 1, len(rewards))
        gaps = [rewards[k] - rewards[i] for i in worse]
        own = np.exp(max(gaps) * scores[k])
        others = sum(np.exp(gap * scores[i]) for gap, i in zip(gaps, worse))
        loss -= np.log(own / (own + others))
    return loss


def rwr_loss(logps, rewards, tau):
    weights = [np.exp(r / tau) for r in rewards]
    return -sum(w * s for w, s in zip(weights, logps)) / sum(weights)


def rwr_target(ref, rewards, tau, M):
    """Where the expected loss on M samples of `ref` is least: the mean weight of each response."""
    target = np.zeros(len(ref))
    for chosen in itertools.product(range(len(ref)), repeat=M):  # every list that can be drawn
        weights = np.exp(np.array(rewards)[list(chosen)] / tau)
        for j, weight in zip(chosen, weights / weights.sum()):
            target[j] += np.prod(np.array(ref)[list(chosen)]) * weight
    return target


def kl(probs, ref):
    return sum(a * np.log(a / b) for a, b in zip(probs, ref) if a > 0)


def tau_at_kl(refs, rewards, K):
    """The one tau, shared by all prompts, at which the mean KL of the tilts is K."""
    low, high = 1e-3, 1e3
    for _ in range(100):
        middle = np.sqrt(low * high)
        if np.mean([kl(tilt(b, r, middle), b) for b, r in zip(refs, rewards)]) > K:
            low = middle
        else:
            high = middle
    return np.sqrt(low * high)


# Byte-pair encoding: every step counts all pairs of the whole text anew


def merge(word, pair):
    merged, k = [], 0
    while k < len(word):
        joins = tuple(word[k : k + 2]) == pair
        merged.append(word[k] + word[k + 1] if joins else word[k])
        k += 2 if joins else 1
    return merged


def naive_bpe(texts, vocab_size, pattern):
    """{token: rank}, one id of vocab_size left to EOS.

    The most frequent pair within the pre-tokens is joined, at a tie the smallest (left bytes, right
    bytes), until no pair occurs twice.
    """
    words = [
        [bytes([b]) for b in piece.encode()]
        for text in texts
        for piece in re.findall(pattern, text)
    ]
    vocabulary = [bytes([b]) for b in range(256)]
    while len(vocabulary) < vocab_size - 1:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        repeated = [pair for pair in counts if counts[pair] >= 2]
        if not repeated:
            break
        best = sorted(repeated, key=lambda pair: (-counts[pair], pair[0], pair[1]))[0]
        if best[0] + best[1] not in vocabulary:
            vocabulary.append(best[0] + best[1])
        words = [merge(word, best) for word in words]
    return {token: rank for rank, token in enumerate(vocabulary)}
