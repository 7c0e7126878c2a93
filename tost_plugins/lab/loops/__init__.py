"""One file for each trainer that a recipe can name: `run(job, resume)` trains and returns the finished session. Each knows
that framework and its adapter, and no other loop.

May import: errors, training, files, session, recipe, lab.
"""
