"""What the command `tost` does, and nothing else imports: training a recipe from the shell (`train`, `loops`, `models`,
`data`), many of them (`grid`, `compare`, `studies`, `reproduce`), and what people look at (`report`, `page`, `progress`).

May import: errors, training, files, masks, tweaks, session, recipe, lottery, adapters.
"""
