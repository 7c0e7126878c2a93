"""One file for each way to find a mask, and the registry: a recipe's `kind` -> its class. A new method is one file and one
row here, an entry in `OPTIONS` of tests/mask_nets.py, by which the laws run over it, and a row in docs/masks.md.

May import: errors, training, files, masks.
"""

from tost_plugins.masks.like import METHODS
from tost_plugins.masks.methods.ac_dc import AcDc
from tost_plugins.masks.methods.auto import Auto
from tost_plugins.masks.methods.dnw import Dnw
from tost_plugins.masks.methods.edge_popup import EdgePopup
from tost_plugins.masks.methods.eoi import Eoi
from tost_plugins.masks.methods.file import File
from tost_plugins.masks.methods.from_zeros import FromZeros
from tost_plugins.masks.methods.gradual import Gradual
from tost_plugins.masks.methods.grasp import Grasp
from tost_plugins.masks.methods.lottery_ticket import LotteryTicket
from tost_plugins.masks.methods.magnitude import Magnitude
from tost_plugins.masks.methods.random import Random
from tost_plugins.masks.methods.rigl import RigL
from tost_plugins.masks.methods.selfish import Selfish
from tost_plugins.masks.methods.set import Set
from tost_plugins.masks.methods.snfs import Snfs
from tost_plugins.masks.methods.snip import Snip
from tost_plugins.masks.methods.synflow import SynFlow
from tost_plugins.masks.methods.top_kast import TopKast
from tost_plugins.training.by_hand import worded

MASKS: dict[str, type] = {
    "auto": Auto,
    "file": File,
    "from_zeros": FromZeros,
    "random": Random,
    "magnitude": Magnitude,
    "snip": Snip,
    "grasp": Grasp,
    "synflow": SynFlow,
    "eoi": Eoi,
    "lottery_ticket": LotteryTicket,
    "set": Set,
    "rigl": RigL,
    "snfs": Snfs,
    "selfish": Selfish,
    "dnw": Dnw,
    "top_kast": TopKast,
    "gradual": Gradual,
    "ac_dc": AcDc,
    "edge_popup": EdgePopup,
}

for method in MASKS.values():
    worded(method)
METHODS.update(MASKS)
