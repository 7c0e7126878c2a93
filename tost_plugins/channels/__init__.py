"""Channels that no path runs through, left out of the computation: which they are, together with all that has to keep the
same ones (`plan`), a network that computes the others alone, with its own parameters (`slices`), one that has no others
(`removal`), and files that hold nothing of what is removed (`packed`).

May import: errors, training, files, masks, tweaks.
"""
