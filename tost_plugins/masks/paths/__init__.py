"""What a mask connects: a network's own forward pass is followed once (`follow`), with a rule for each of torch's functions
(`rules`), and says which weights lie on a path from its inputs to its outputs (`connectivity`).

May import: errors, training, masks.
"""
