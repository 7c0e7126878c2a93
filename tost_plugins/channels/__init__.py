"""Channels that no path runs through, left out of the computation: which they are, together with all that has to keep the
same ones (`plan`), and a network that computes the others alone, with its own parameters (`slices`).

May import: errors, training, files, masks, tweaks.
"""
