"""Says when an embedding has collapsed: the scores may still look good then.

A triplet loss falls fastest when all images move to one point. There every distance is 0 and the
loss of every triplet is the margin: the ranking loss teaches nothing any more, and whatever the
network retrieves it owes to the classification loss.
"""

import numpy as np

ROWS = 5  # of the history, the last ones, that are judged together
NEAR_MARGIN = 0.05  # of the margin: how near the ranking loss is when it sits there
ALL_ACTIVE = 0.95  # share of active triplets
ONE_POINT = 0.95  # norm of the mean of unit vectors

# By `model.center`: what keeps the embedding apart. See docs/collapse.md for what was measured.
REMEDIES = {
    "none": "train again with --config.model.center=direction, which keeps embeddings apart",
    "mean": "train again with --config.model.center=direction, which long descriptors cannot evade",
    "direction": "try a lower --config.optimizer.learning_rate, or more steps",
}


def warnings(rows: list[dict[str, float]], margin: float | None, center: str) -> list[str]:
    """Returns a sentence with its remedy for each sign of a collapse at the end of a run.

    Rows of the history count that have "ranking_loss", "active_triplets" (a share) and
    "mean_embedding_norm"; fewer than `ROWS` are not judged. `margin` is None if the loss has none.
    """
    found = []
    loss, active = _latest(rows, "ranking_loss"), _latest(rows, "active_triplets")
    if margin and abs(loss - margin) <= NEAR_MARGIN * margin and active >= ALL_ACTIVE:
        found.append(
            f"The ranking loss sits at its margin ({loss:.4g} of {margin:g}, with {active:.0%} of "
            f"the triplets active, over the last {ROWS} rows of the history), as it does when all "
            f"images lie in one point; {REMEDIES[center]}."
        )
    norm = _latest(rows, "mean_embedding_norm")
    if norm > ONE_POINT:
        found.append(
            f"The mean embedding has norm {norm:.3f} over the last {ROWS} rows of the history, "
            f"where 1 means that all images lie in one point; {REMEDIES[center]}."
        )
    return found


def _latest(rows: list[dict[str, float]], key: str) -> float:
    """Returns the mean of a column over the last rows that have it; nan if they are too few."""
    values = [row[key] for row in rows if key in row][-ROWS:]
    return float(np.mean(values)) if len(values) == ROWS else float("nan")
