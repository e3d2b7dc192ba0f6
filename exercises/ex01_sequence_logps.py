"""Exercise 1 (implement, 20 minutes): the log-probability of a response.

Everything in LIRE and DRO stands on one number per response y to a prompt x, log pi(y | x): a
natural log, so its unit is the nat. A language model gives logits for the next token at every place
of the text; the number you want is

    log pi(y | x) = sum_t log softmax(logits at the place before y_t)[y_t]

the sum over the response's tokens. Its end token (EOS) is one of them: to stop there is a choice of
the model too, with a probability of its own. The prompt's tokens are not: x is given.

Write `sequence_logps` below. B texts, each T tokens long, V tokens in the vocabulary:

    logits [B, T, V]   logits[b, t] predicts the token ids[b, t + 1]
    ids    [B, T]      a text: prompt, response, EOS, padding (any id below V in the padding)
    mask   [B, T]      bool, True on the response's tokens, EOS included

    Returns: [B], in nats, float32 even where the logits are bfloat16. It is to be trained with: the
    gradient goes to the logits.

A worked example. V = 3, one text of T = 3 tokens: prompt 0, response 1 and then 2, which is EOS.
The logits after the prompt are log(0.2, 0.5, 0.3), and after the 1 they are log(0.1, 0.1, 0.8). So
log pi = log 0.5 + log 0.8 = log 0.4 = -0.9163. What stands in logits[0, 2] predicts nothing.

Padding can hold anything, nan in its logits too. nan x 0 is nan; torch.where does not multiply, it
selects.

    python -m exercises.check 1
"""

from torch import Tensor


def sequence_logps(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """log pi(response | prompt) [B] of every text."""
    raise NotImplementedError("exercise 1: the log-probability of a response")
