"""What the command `tost` does, and nothing else imports. One run: `train` and `job`, under a trainer of `loops`, on `models` and
`data`, with its `checkpoints`, `export` and `progress`. Many: `compare`, `lottery`, `grid`, `studies`, `reproduce`. What people
look at: `cli`, `report`, `page`.

May import: errors, training, files, masks, channels, tweaks, session, recipe, lottery, adapters.
"""
