"""Channels that a mask leaves without a path, and what is done about them: networks that do not compute them (`removal`), and
files that hold nothing of them (`packed`).

May import: errors, training, files, masks, tweaks.
"""
