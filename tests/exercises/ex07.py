import torch


def optimal_value(ref_logps, rewards, tau):
    return tau * torch.logsumexp(ref_logps + rewards / tau, -1)


def optimal_logps(ref_logps, rewards, tau):
    return (ref_logps + rewards / tau).log_softmax(-1)


def shifted(values, logps, c):
    return values + c, logps


def equivalent_tau(tau, factor):
    return factor * tau


def scaled_value(values, factor):
    return factor * values
