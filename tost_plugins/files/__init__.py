"""Files that survive kills and strangers: written whole or not at all (`atomic`), pickles that hold plain values only
(`pickles`), and the tensors in files of any kind (`tensors`).

May import: errors, training.
"""
