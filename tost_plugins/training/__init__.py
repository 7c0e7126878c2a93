"""What a training run is made of, whoever runs it: its network's weights and their names (`params`), its batches and loss
(`task`), its clock, schedules and seeds, its processes (`ranks`, `sharding`), and the one line that says what happens (`log`).

May import: errors.
"""
