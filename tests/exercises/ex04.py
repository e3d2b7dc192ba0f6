import torch

PREDICTED = {
    "sum": {1: 0.9, 2: 0.8, 4: 0.6, 8: 0.4},
    "mean": {1: 0.2, 2: 0.2, 4: 0.15, 8: 0.13},
    "shortest wins": {"sum": 0.7, "mean": 0.13},
}


def scores(lengths, lists, how, generator):
    longest = int(lengths.max())
    drawn = torch.randn(lists, len(lengths), longest, generator=generator)  # [N, M, T]
    logps = -2 + 1.45 * drawn
    real = torch.arange(longest) < lengths[:, None]  # [M, T]
    total = torch.where(real, logps, 0.0).sum(-1)  # [N, M]
    return total if how == "sum" else total / lengths


def largest_prob(scores, temperature):
    P = (scores / temperature).softmax(-1)
    return P.amax(-1).mean().item()


def shortest_wins(scores, lengths):
    wins = scores.argmax(-1) == lengths.argmin()
    return wins.float().mean().item()


def draw(path):
    import matplotlib.pyplot as plt

    generator = torch.Generator().manual_seed(0)
    lengths = (5, 20, 50, 128)
    figure, sides = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
    for how, side in zip(("sum", "mean"), sides):
        drawn = [scores(torch.full((8,), n), 500, how, generator) for n in lengths]
        for T in (1, 2, 4, 8):
            side.plot(lengths, [largest_prob(s, T) for s in drawn], marker="o", label=f"T = {T}")
        side.set(title=f"{how}s", xlabel="tokens", ylim=(0, 1))
    sides[0].set_ylabel("mean largest P")
    sides[1].legend()
    figure.savefig(path)
    plt.close(figure)
