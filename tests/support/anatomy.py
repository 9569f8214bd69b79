"""The alignment loss as the plainest loop over rows."""

import itertools

import torch


def unit(vector):
    return vector / vector.pow(2).sum().sqrt()


def candidates(ids, view, frame, own, *, drop_same_id):
    """Where each row that is compared stands, and whether it is a positive."""
    for other, frame2, draw2 in itertools.product(*map(range, ids.shape)):
        name = int(ids[other, frame2, draw2])
        same, twin = frame2 == frame and name == own, frame2 != frame and name == own
        if name == 0 or (other == view and same) or (drop_same_id and twin):
            continue
        yield (other, frame2, draw2), other != view and same


def plain_alignment(predictions, targets, ids, temperature, *, drop_same_id=False):
    """One row at a time: list its candidates, then -mean log softmax of the positives."""
    _, frames, draws = ids.shape
    total = torch.zeros((), dtype=predictions.dtype)
    for view, frame, draw in itertools.product(*map(range, ids.shape)):
        own = int(ids[view, frame, draw])
        anchor = unit(predictions[view, frame, draw])
        found = [
            (anchor @ unit(targets[place]) / temperature, positive)
            for place, positive in candidates(ids, view, frame, own, drop_same_id=drop_same_id)
        ]
        positives = [score for score, positive in found if positive]
        if own == 0 or not positives:
            continue
        log_sum = torch.logsumexp(torch.stack([score for score, _ in found]), 0)
        cost = -sum(score - log_sum for score in positives) / len(positives)
        times = sum(int(name) == own for name in ids[view, frame])
        total = total + cost / times
    return total / (frames * draws)
