"""Files that survive kills and strangers: written whole or not at all (`atomic`), by one process at a time (`locks`). What people
keep weights and masks in, as tensors by name (`containers`, a table): files of safetensors and torch.save (`tensors`, with
`pickles` that hold plain values only, and dicts in dicts: `nested`), archives (`arrays`), folders and shards (`folders`),
torch.distributed.checkpoint (`distributed`, whose pickles are `records`), our packed files (`packed`), and the names that
transformers writes (`renamed`).

May import: errors, training.
"""
