"""The formulas once more, in float64 numpy, written from the papers: the judge of lire.py, dro.py and data.py.

Everything works on one list at a time (s, r: [M]), so no mask can be forgotten here.
"""

import re
from collections import Counter

import numpy as np


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


# LIRE (arXiv 2405.13516)


def candidate_probs(s, T):
    """Eq. 4."""
    return softmax(np.asarray(s, float) / T)


def transform_rewards(r, how):
    r = np.asarray(r, float)
    if how == "softmax":
        return softmax(r)
    if how == "zscore":
        return np.zeros_like(r) if np.ptp(r) == 0 else (r - np.mean(r)) / np.std(r)
    return r


def lire_loss(s, R, T):
    """Eq. 5."""
    return -np.dot(candidate_probs(s, T), R)


def lire_grad(s, R, T):
    """d loss / d s_j = -(1/T) P_j (R_j - sum_m P_m R_m)."""
    P = candidate_probs(s, T)
    return np.array([-(P[j] / T) * (R[j] - np.dot(P, R)) for j in range(len(P))])


def sft_loss(s, lengths, r):
    """Mean negative log-likelihood of a token of the first best-rewarded response."""
    best = next(j for j in range(len(r)) if r[j] == max(r))
    return -s[best] / lengths[best]


def mrt_risk(p, risks, alpha):
    """Minimum risk training (Shen et al. 2016): expected risk under Q_j = p_j^alpha / sum_m p_m^alpha."""
    Q = np.asarray(p, float) ** alpha
    return np.dot(Q / Q.sum(), risks)


def finite_differences(f, x, h=1e-5):
    """Central differences of the scalar function f at x."""
    x = np.asarray(x, float)
    return np.array([(f(x + h * unit) - f(x - h * unit)) / (2 * h) for unit in np.eye(len(x))])


# DRO (arXiv 2405.19107): the reference is given as probabilities over an enumerated set


def optimal_value(ref, r, tau):
    """V* = tau log E_ref exp(r / tau)."""
    top = np.max(r)
    return top + tau * np.log(np.dot(ref, np.exp((np.asarray(r, float) - top) / tau)))


def optimal_policy(ref, r, tau):
    """Eq. 2."""
    return np.asarray(ref) * np.exp((np.asarray(r, float) - optimal_value(ref, r, tau)) / tau)


def tilt(ref, r, tau):
    """The same policy without V*: reweight and normalise."""
    return softmax(np.log(ref) + np.asarray(r, float) / tau)


def dro_loss(s, ref, r, V, tau):
    """Eq. 4, response by response."""
    return np.array([0.5 * (r[i] - V[i] - tau * (s[i] - ref[i])) ** 2 for i in range(len(s))])


def dro_p_loss(s, ref, r, tau):
    """Appendix B: half the mean squared distance of two residuals drawn from the batch, over two."""
    x = [r[i] - tau * (s[i] - ref[i]) for i in range(len(s))]
    return np.mean([(a - b) ** 2 for a in x for b in x]) / 4


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


def ranked(r):
    """Indices from best to worst, equal ones as they stand."""
    return sorted(range(len(r)), key=lambda j: -r[j])


def plackett_luce_loss(ratios, r, beta):
    """The best is drawn first, then the best of the rest, and so on: minus the log of the product of these odds."""
    order, p = ranked(r), 1.0
    while order:
        p *= np.exp(beta * ratios[order[0]]) / sum(np.exp(beta * ratios[j]) for j in order)
        order = order[1:]
    return -np.log(p)


def rrhf_loss(s, lengths, r):
    p = np.asarray(s, float) / np.asarray(lengths)
    return sum(max(0.0, p[i] - p[j]) for i in range(len(r)) for j in range(len(r)) if r[i] < r[j])


def pro_loss(s, lengths, r):
    order, loss = ranked(r), 0.0
    p, r = (np.asarray(s, float) / np.asarray(lengths))[order], np.asarray(r, float)[order]
    for k in range(len(r) - 1):
        inverse = [r[k] - r[i] for i in range(k + 1, len(r))]
        own = np.exp(max(inverse) * p[k])
        loss -= np.log(
            own / (own + sum(np.exp(t * p[i]) for t, i in zip(inverse, range(k + 1, len(r)))))
        )
    return loss


def kl(p, q):
    return sum(a * np.log(a / b) for a, b in zip(p, q) if a > 0)


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
    """{token: rank}, one id of vocab_size left to EOS. The most frequent pair within the pre-tokens is joined, the
    smallest (left bytes, right bytes) at a tie, until no pair occurs twice."""
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
