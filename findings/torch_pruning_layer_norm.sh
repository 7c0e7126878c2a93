#!/usr/bin/env bash
# torch-pruning 1.6.0 (torch 2.7.0, torchvision 0.22.0): taking out channels whose weights are all 0 leaves a
# ResNet's outputs as they were and changes a ConvNeXt's by 7 to 31 %.
# Expected: channels that are 0 in every layer, of importance 0, cost nothing when they go; or a word that they do.
# Seen: a layer norm's mean and variance are those of the channels that it has. The dead ones counted there, as zeros;
#   without them every channel that stays is scaled and shifted. The only warning is about layer_scale. Layer norms
#   that go on counting the channels that are gone give the old outputs back.
# Hit: whoever shrinks a network after sparse training or by channel masks and takes it for the network that was
#   evaluated, where layer norms count channels that can go.
# Output seen:
#   torch-pruning 1.6.0, torch 2.7.0, torchvision 0.22.0
#   channels that are 0 and go; live weights that stay; outputs change by; if layer norms count as before
#   resnet     12.5%  100.0%   6.3e-07   6.3e-07
#   resnet     25.0%  100.0%   0.0e+00   0.0e+00
#   resnet     50.0%  100.0%   0.0e+00   0.0e+00
#   convnext   12.5%  100.0%   6.8e-02   2.2e-07
#   convnext   25.0%  100.0%   1.4e-01   2.1e-07
#   convnext   50.0%  100.0%   3.1e-01   1.9e-07
#   warnings for convnext: ['Unwrapped parameters detected']
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile torch==2.7.0 torchvision==0.22.0 numpy==2.3.5 torch-pruning==1.6.0
cd "$work"
venv/bin/python - <<'EOF'
import warnings
from importlib.metadata import version

import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

images = torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def resnet():
    return resnet18(num_classes=10)


def convnext():
    blocks = [CNBlockConfig(32, 64, 2), CNBlockConfig(64, None, 2)]
    return ConvNeXt(blocks, stochastic_depth_prob=0.0, layer_scale=0.1, num_classes=10)


def kill(net, share, last):
    """Set to 0 all that belongs to the first channels of each group of layers that share their channels."""
    graph = tp.DependencyGraph().build_dependency(net, example_inputs=images[:1])
    for whole in graph.get_all_groups(ignored_layers=[last]):
        layer, handler = whole[0].dep.target.module, whole[0].dep.handler
        dead = list(range(int(len(whole[0].idxs) * share)))
        for dep, channels in graph.get_pruning_group(layer, handler, dead):
            module, inputs = dep.target.module, dep.handler.__name__ == "prune_in_channels"
            if isinstance(module, nn.Parameter):
                module.data[channels] = 0
            elif inputs:
                module.weight.data[:, channels] = 0
            else:
                for tensor in module.parameters():
                    tensor.data[channels] = 0


class Counting(nn.Module):
    """A layer norm that counts the channels that are gone, as zeros."""

    def __init__(self, norm, width):
        super().__init__()
        self.norm, self.gone = norm, width - norm.weight.numel()
        self.width, self.first = width, type(norm) is not nn.LayerNorm  # torchvision's LayerNorm2d: channels first

    def forward(self, x):
        x = x.permute(0, 2, 3, 1) if self.first else x
        weight, bias = (F.pad(tensor, (0, self.gone)) for tensor in (self.norm.weight, self.norm.bias))
        x = F.layer_norm(F.pad(x, (0, self.gone)), (self.width,), weight, bias, self.norm.eps)[..., : -self.gone]
        return x.permute(0, 3, 1, 2) if self.first else x


def changed(before, after):
    return ((after - before).norm() / before.norm()).item()


def case(make, share):
    torch.manual_seed(0)
    net = make().eval()
    last = list(net.modules())[-1]
    kill(net, share, last)
    before = net(images)
    alive = sum(int(p.count_nonzero()) for p in net.parameters())
    widths = {name: m.weight.numel() for name, m in net.named_modules() if isinstance(m, nn.LayerNorm)}
    importance = tp.importance.GroupMagnitudeImportance()
    tp.pruner.BasePruner(net, images[:1], importance, pruning_ratio=share, ignored_layers=[last]).step()
    kept = sum(int(p.count_nonzero()) for p in net.parameters())
    after = net(images)
    for name, width in widths.items():
        net.set_submodule(name, Counting(net.get_submodule(name), width))
    return kept / alive, changed(before, after), changed(before, net(images))


said = {}
print(", ".join(f"{name} {version(name).split('+')[0]}" for name in ("torch-pruning", "torch", "torchvision")))
print("channels that are 0 and go; live weights that stay; outputs change by; if layer norms count as before")
for make in (resnet, convnext):
    for share in (1 / 8, 1 / 4, 1 / 2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kept, plain, counting = case(make, share)
        print(f"{make.__name__:9} {share:6.1%} {kept:7.1%} {plain:9.1e} {counting:9.1e}")
        said[make] = sorted({str(warning.message).split(":")[0] for warning in caught})
        assert kept == 1, "it takes others"
        assert plain < 1e-5 if make is resnet else plain > share / 3, "behaviour has changed"
        assert counting < 1e-5, "it is not the layer norms' count"
print(f"warnings for convnext: {said[convnext]}")
assert said[convnext] == ["Unwrapped parameters detected"], "behaviour has changed"
EOF
