"""Files that survive kills and strangers: written whole or not at all (`atomic`), pickles that hold plain values only
(`pickles`).

May import: errors.
"""
