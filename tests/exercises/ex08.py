AGREE_AT_TAU = 1.0
DERIVED_AT_TWO = "at pi*"
PRINTED_AT_HALF = "between pi_ref and pi*"
PRINTED_AT_FIVE = "nowhere: it diverges"


def losses(logps, ref_logps, rewards, values, tau):
    ref_logps, rewards = ref_logps.detach(), rewards.detach()
    ratios = logps - ref_logps
    policy = -logps * (rewards - values.detach()) + tau / 2 * ratios.square()
    value = 0.5 * (rewards - tau * ratios.detach() - values).square()
    return policy, value
