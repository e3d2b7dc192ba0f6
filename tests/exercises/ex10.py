def different(lists):
    shares = [len({tuple(ids) for ids in own}) / len(own) for own in lists]
    return sum(shares) / len(shares)


def tied(rewards):
    return sum(len(set(own)) == 1 for own in rewards) / len(rewards)


def settings():
    return {"candidates": 16, "sample_temperature": 1.0, "temperature": 8.0, "sft_weight": 0.1}


loss = None
