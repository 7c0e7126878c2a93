"""Changes of the training that end, one file each, and their registry: a recipe's `kind` -> its class. A new tweak is one
file and one row here. Nothing here knows masks' methods, sessions or recipes.

May import: errors, training.
"""

from tost_plugins.training.by_hand import worded
from tost_plugins.tweaks.base import Tweak
from tost_plugins.tweaks.ghost_skip import GhostSkip
from tost_plugins.tweaks.label_smoothing import LabelSmoothing
from tost_plugins.tweaks.multiplicative import Multiplicative
from tost_plugins.tweaks.neuron_gradients import NeuronGradients
from tost_plugins.tweaks.rescaled_init import RescaledInit
from tost_plugins.tweaks.sharpness import Sharpness
from tost_plugins.tweaks.soft_activation import SoftActivation
from tost_plugins.tweaks.sparse_init import SparseInit

TWEAKS: dict[str, type[Tweak]] = {
    "ghost_skip": GhostSkip,
    "soft_activation": SoftActivation,
    "rescaled_init": RescaledInit,
    "label_smoothing": LabelSmoothing,
    "neuron_gradients": NeuronGradients,
    "multiplicative": Multiplicative,
    "sparse_init": SparseInit,
    "sharpness": Sharpness,
}

for tweak in TWEAKS.values():
    worded(tweak)
