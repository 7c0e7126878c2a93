"""Files that survive kills and strangers: written whole or not at all (`atomic`), by one process at a time (`locks`); pickles
that hold plain values only (`pickles`), and the tensors in files of any kind (`tensors`).

May import: errors, training.
"""
