"""What a recipe's `watch` measures while a network trains: pure functions that return rows, and the one that looks.

May import: errors, training, files, masks.
"""
