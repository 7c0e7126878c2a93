"""The studies of both papers: which runs (`training`, `structure`, `watching`), what is measured on what they leave
(`reinit`, `robustness`), how it is drawn, and the registry. A new study is one entry there.

May import: errors, training, files, masks, channels, tweaks, session, recipe, lab.
"""
