"""The names of each family of networks beside the artefact's: the data of the rename engine.

In a row `<n>` is the stage, counted from n, and is written out four times; `{}` is a block index. The artefact's
names (right) are torchvision's for ResNets and timm's for ViTs.
"""

from __future__ import annotations

import re

from twist.contracts.rename import TORCH_LEAVES, Kind, Leaves, Table

Rows = tuple[tuple[Kind, str, str], ...]


def _stages(rows: Rows) -> Rows:
    """Each row with `<n>` four times, once a stage; rows without it once."""

    def written(text: str, stage: int) -> str:
        return re.sub(r"<(\d)>", lambda match: str(int(match[1]) + stage), text)

    stem = [row for row in rows if "<" not in row[1]]
    staged = [row for row in rows if "<" in row[1]]
    return (*stem, *((kind, written(a, s), written(b, s)) for s in range(4) for kind, a, b in staged))


def _identity(rows: Rows) -> Rows:
    return tuple((kind, there, there) for kind, _, there in rows)


# Detectron2 (also what every "convert to detectron2" script of the field writes).
_DETECTRON2: Rows = (
    ("conv", "stem.conv1", "conv1"),
    ("norm", "stem.conv1.norm", "bn1"),
    ("conv", "res<2>.{}.conv1", "layer<1>.{}.conv1"),
    ("norm", "res<2>.{}.conv1.norm", "layer<1>.{}.bn1"),
    ("conv", "res<2>.{}.conv2", "layer<1>.{}.conv2"),
    ("norm", "res<2>.{}.conv2.norm", "layer<1>.{}.bn2"),
    ("conv", "res<2>.{}.conv3", "layer<1>.{}.conv3"),
    ("norm", "res<2>.{}.conv3.norm", "layer<1>.{}.bn3"),
    ("conv", "res<2>.{}.shortcut", "layer<1>.{}.downsample.0"),
    ("norm", "res<2>.{}.shortcut.norm", "layer<1>.{}.downsample.1"),
)

# torchvision's ResNet cut into nn.Sequential(*children): lightly's examples.
_SEQUENTIAL: Rows = (
    ("conv", "0", "conv1"),
    ("norm", "1", "bn1"),
    ("conv", "<4>.{}.conv1", "layer<1>.{}.conv1"),
    ("norm", "<4>.{}.bn1", "layer<1>.{}.bn1"),
    ("conv", "<4>.{}.conv2", "layer<1>.{}.conv2"),
    ("norm", "<4>.{}.bn2", "layer<1>.{}.bn2"),
    ("conv", "<4>.{}.conv3", "layer<1>.{}.conv3"),
    ("norm", "<4>.{}.bn3", "layer<1>.{}.bn3"),
    ("conv", "<4>.{}.downsample.0", "layer<1>.{}.downsample.0"),
    ("norm", "<4>.{}.downsample.1", "layer<1>.{}.downsample.1"),
)

# SimCLR v2 as Separius/SimCLRv2-Pytorch builds it (sk0): every norm is the first of a BatchNormRelu pair.
_SIMCLR_V2: Rows = (
    ("conv", "net.0.0", "conv1"),
    ("norm", "net.0.1.0", "bn1"),
    ("conv", "net.<1>.blocks.{}.net.0", "layer<1>.{}.conv1"),
    ("norm", "net.<1>.blocks.{}.net.1.0", "layer<1>.{}.bn1"),
    ("conv", "net.<1>.blocks.{}.net.2", "layer<1>.{}.conv2"),
    ("norm", "net.<1>.blocks.{}.net.3.0", "layer<1>.{}.bn2"),
    ("conv", "net.<1>.blocks.{}.net.4", "layer<1>.{}.conv3"),
    ("norm", "net.<1>.blocks.{}.net.5.0", "layer<1>.{}.bn3"),
    ("conv", "net.<1>.blocks.{}.projection.shortcut", "layer<1>.{}.downsample.0"),
    ("norm", "net.<1>.blocks.{}.projection.bn.0", "layer<1>.{}.downsample.1"),
)

# DeepMind's BYOL: haiku module paths without their `~` segments and leading scopes (containers.py removes those).
_HAIKU: Rows = (
    ("conv", "initial_conv", "conv1"),
    ("norm", "initial_batchnorm", "bn1"),
    ("conv", "block_group_<0>/block_{}/conv_0", "layer<1>.{}.conv1"),
    ("norm", "block_group_<0>/block_{}/batchnorm_0", "layer<1>.{}.bn1"),
    ("conv", "block_group_<0>/block_{}/conv_1", "layer<1>.{}.conv2"),
    ("norm", "block_group_<0>/block_{}/batchnorm_1", "layer<1>.{}.bn2"),
    ("conv", "block_group_<0>/block_{}/conv_2", "layer<1>.{}.conv3"),
    ("norm", "block_group_<0>/block_{}/batchnorm_2", "layer<1>.{}.bn3"),
    ("conv", "block_group_<0>/block_{}/shortcut_conv", "layer<1>.{}.downsample.0"),
    ("norm", "block_group_<0>/block_{}/shortcut_batchnorm", "layer<1>.{}.downsample.1"),
)
_HAIKU_LEAVES: Leaves = {
    "conv": (("/w", ".weight", "hwio"),),
    "norm": (
        ("/scale", ".weight", "flat"),
        ("/offset", ".bias", "flat"),
        ("/mean_ema/average", ".running_mean", "flat"),
        ("/var_ema/average", ".running_var", "flat"),
    ),
}

# Caffe2 names of the MSRA models (Detectron2's c2_model_loading.py knows the same). Norms are affine only.
_CAFFE2: Rows = (
    ("conv", "conv1", "conv1"),
    ("norm", "res_conv1", "bn1"),
    ("conv", "res<2>_{}_branch2a", "layer<1>.{}.conv1"),
    ("norm", "res<2>_{}_branch2a", "layer<1>.{}.bn1"),
    ("conv", "res<2>_{}_branch2b", "layer<1>.{}.conv2"),
    ("norm", "res<2>_{}_branch2b", "layer<1>.{}.bn2"),
    ("conv", "res<2>_{}_branch2c", "layer<1>.{}.conv3"),
    ("norm", "res<2>_{}_branch2c", "layer<1>.{}.bn3"),
    ("conv", "res<2>_{}_branch1", "layer<1>.{}.downsample.0"),
    ("norm", "res<2>_{}_branch1", "layer<1>.{}.downsample.1"),
)
_CAFFE2_LEAVES: Leaves = {
    "conv": (("_w", ".weight", "same"),),
    "norm": (("_bn_s", ".weight", "same"), ("_bn_b", ".bias", "same")),
}

# MMSegmentation's VisionTransformer (torch's own MultiheadAttention inside).
_MMSEG_VIT: Rows = (
    ("linear", "patch_embed.projection", "patch_embed.proj"),
    ("tensor", "cls_token", "cls_token"),
    ("tensor", "pos_embed", "pos_embed"),
    ("scale", "layers.{}.ln1", "blocks.{}.norm1"),
    ("tensor", "layers.{}.attn.attn.in_proj_weight", "blocks.{}.attn.qkv.weight"),
    ("tensor", "layers.{}.attn.attn.in_proj_bias", "blocks.{}.attn.qkv.bias"),
    ("linear", "layers.{}.attn.attn.out_proj", "blocks.{}.attn.proj"),
    ("scale", "layers.{}.ln2", "blocks.{}.norm2"),
    ("linear", "layers.{}.ffn.layers.0.0", "blocks.{}.mlp.fc1"),
    ("linear", "layers.{}.ffn.layers.1", "blocks.{}.mlp.fc2"),
    ("scale", "ln1", "norm"),
)

# mmpretrain's VisionTransformer: the same but for its own attention.
_MMPRETRAIN_VIT: Rows = (
    ("linear", "patch_embed.projection", "patch_embed.proj"),
    ("tensor", "cls_token", "cls_token"),
    ("tensor", "pos_embed", "pos_embed"),
    ("scale", "layers.{}.ln1", "blocks.{}.norm1"),
    ("linear", "layers.{}.attn.qkv", "blocks.{}.attn.qkv"),
    ("linear", "layers.{}.attn.proj", "blocks.{}.attn.proj"),
    ("scale", "layers.{}.ln2", "blocks.{}.norm2"),
    ("linear", "layers.{}.ffn.layers.0.0", "blocks.{}.mlp.fc1"),
    ("linear", "layers.{}.ffn.layers.1", "blocks.{}.mlp.fc2"),
    ("scale", "ln1", "norm"),
)

_COUNTER = (".num_batches_tracked",)
TORCHVISION = Table("torchvision", _stages(_identity(_DETECTRON2)), TORCH_LEAVES, absent=_COUNTER)
SEQUENTIAL = Table("torchvision-sequential", _stages(_SEQUENTIAL), TORCH_LEAVES, absent=_COUNTER)
DETECTRON2 = Table("detectron2", _stages(_DETECTRON2), TORCH_LEAVES, absent=_COUNTER)
SIMCLR_V2 = Table("simclr-v2", _stages(_SIMCLR_V2), TORCH_LEAVES, absent=_COUNTER)
HAIKU = Table("haiku", _stages(_HAIKU), _HAIKU_LEAVES, absent=_COUNTER)
CAFFE2 = Table("caffe2", _stages(_CAFFE2), _CAFFE2_LEAVES, absent=(*_COUNTER, ".running_mean", ".running_var"))
TIMM_VIT = Table("timm-vit", _identity(_MMPRETRAIN_VIT), TORCH_LEAVES)
MMSEG_VIT = Table("mmseg-vit", _MMSEG_VIT, TORCH_LEAVES)
MMPRETRAIN_VIT = Table("mmpretrain-vit", _MMPRETRAIN_VIT, TORCH_LEAVES)
TABLES = {
    t.name: t
    for t in (
        TORCHVISION, SEQUENTIAL, DETECTRON2, SIMCLR_V2, HAIKU, CAFFE2, TIMM_VIT, MMSEG_VIT, MMPRETRAIN_VIT,
    )
}  # fmt: skip
