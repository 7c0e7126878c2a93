"""Lottery tickets: rounds of train, prune, rewind (`rounds`) around a training function of one's own (`ticket`, `round`).
What a round's mask is, the mask method `lottery_ticket` says; weights are kept in line by the session's masked weights.

May import: errors, training, files, masks, session.
"""
