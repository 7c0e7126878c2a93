"""How a tweak changes a network and gives it back: another class for a module (`swap`), what runs where (`trace`), which
channels say something (`alive`).

May import: errors, training.
"""
