"""Rename tables: the names that each family of networks uses, next to the artefact's.

The artefact's names are torchvision's for ResNets and timm's for ViTs. `<n>` is the stage, counted from n, and is
written out four times; `{}` is a block index. A ResNet's table has a line for each convolution and the norm after it:
the stem, the three convolutions of a block, its shortcut.
"""

import re

from twist.contracts.rename import TORCH_LEAVES, Kind, Leaves, Table

Rows = tuple[tuple[Kind, str, str], ...]
_COUNTER = (".num_batches_tracked",)
_RESNET = """
    conv1                        bn1
    layer<1>.{}.conv1            layer<1>.{}.bn1
    layer<1>.{}.conv2            layer<1>.{}.bn2
    layer<1>.{}.conv3            layer<1>.{}.bn3
    layer<1>.{}.downsample.0     layer<1>.{}.downsample.1
"""


def _resnet(name: str, paths: str, leaves: Leaves = TORCH_LEAVES, absent: tuple[str, ...] = _COUNTER) -> Table:
    """The table that pairs `paths` with torchvision's, place by place."""

    def written(path: str, stage: int) -> str:
        return re.sub(r"<(\d)>", lambda match: str(int(match[1]) + stage), path)

    kinds: tuple[Kind, Kind] = ("conv", "norm")
    pairs = zip(paths.split(), _RESNET.split(), strict=True)
    rows = [(kinds[index % 2], here, there) for index, (here, there) in enumerate(pairs)]
    stages = tuple((kind, written(a, stage), written(b, stage)) for stage in range(4) for kind, a, b in rows[2:])
    return Table(name, (*rows[:2], *stages), leaves, absent)


TORCHVISION = _resnet("torchvision", _RESNET)

# Detectron2; also what the usual "convert to detectron2" scripts write.
DETECTRON2 = _resnet(
    "detectron2",
    """
    stem.conv1                   stem.conv1.norm
    res<2>.{}.conv1              res<2>.{}.conv1.norm
    res<2>.{}.conv2              res<2>.{}.conv2.norm
    res<2>.{}.conv3              res<2>.{}.conv3.norm
    res<2>.{}.shortcut           res<2>.{}.shortcut.norm
    """,
)

# torchvision's ResNet cut into nn.Sequential(*children): lightly's examples.
SEQUENTIAL = _resnet(
    "torchvision-sequential",
    """
    0                            1
    <4>.{}.conv1                 <4>.{}.bn1
    <4>.{}.conv2                 <4>.{}.bn2
    <4>.{}.conv3                 <4>.{}.bn3
    <4>.{}.downsample.0          <4>.{}.downsample.1
    """,
)

# Hugging Face transformers' ResNet, bottlenecks and basic blocks.
HUGGINGFACE_RESNET = _resnet(
    "huggingface-resnet",
    """
    embedder.embedder.convolution                      embedder.embedder.normalization
    encoder.stages.<0>.layers.{}.layer.0.convolution   encoder.stages.<0>.layers.{}.layer.0.normalization
    encoder.stages.<0>.layers.{}.layer.1.convolution   encoder.stages.<0>.layers.{}.layer.1.normalization
    encoder.stages.<0>.layers.{}.layer.2.convolution   encoder.stages.<0>.layers.{}.layer.2.normalization
    encoder.stages.<0>.layers.{}.shortcut.convolution  encoder.stages.<0>.layers.{}.shortcut.normalization
    """,
)

# SimCLR v2 as Separius/SimCLRv2-Pytorch builds it (sk0): every norm is the first of a BatchNormRelu pair.
SIMCLR_V2 = _resnet(
    "simclr-v2",
    """
    net.0.0                                   net.0.1.0
    net.<1>.blocks.{}.net.0                   net.<1>.blocks.{}.net.1.0
    net.<1>.blocks.{}.net.2                   net.<1>.blocks.{}.net.3.0
    net.<1>.blocks.{}.net.4                   net.<1>.blocks.{}.net.5.0
    net.<1>.blocks.{}.projection.shortcut     net.<1>.blocks.{}.projection.bn.0
    """,
)

# DeepMind's BYOL: haiku module paths without their `~` segments and leading scopes (find.py removes those).
HAIKU = _resnet(
    "haiku",
    """
    initial_conv                              initial_batchnorm
    block_group_<0>/block_{}/conv_0           block_group_<0>/block_{}/batchnorm_0
    block_group_<0>/block_{}/conv_1           block_group_<0>/block_{}/batchnorm_1
    block_group_<0>/block_{}/conv_2           block_group_<0>/block_{}/batchnorm_2
    block_group_<0>/block_{}/shortcut_conv    block_group_<0>/block_{}/shortcut_batchnorm
    """,
    {
        "conv": (("/w", ".weight", "hwio"),),
        "norm": (
            ("/scale", ".weight", "flat"),
            ("/offset", ".bias", "flat"),
            ("/mean_ema/average", ".running_mean", "flat"),
            ("/var_ema/average", ".running_var", "flat"),
        ),
    },
)

# Caffe2 names of the MSRA models (Detectron2's c2_model_loading.py knows the same). Norms are affine only.
CAFFE2 = _resnet(
    "caffe2",
    """
    conv1                        res_conv1
    res<2>_{}_branch2a           res<2>_{}_branch2a
    res<2>_{}_branch2b           res<2>_{}_branch2b
    res<2>_{}_branch2c           res<2>_{}_branch2c
    res<2>_{}_branch1            res<2>_{}_branch1
    """,
    {"conv": (("_w", ".weight", "same"),), "norm": (("_bn_s", ".weight", "same"), ("_bn_b", ".bias", "same"))},
    absent=(*_COUNTER, ".running_mean", ".running_var"),
)

# OpenMMLab's VisionTransformers. MMSegmentation's has torch's own MultiheadAttention inside.
_OPENMMLAB_VIT: Rows = (
    ("linear", "patch_embed.projection", "patch_embed.proj"),
    ("tensor", "cls_token", "cls_token"),
    ("tensor", "pos_embed", "pos_embed"),
    ("scale", "layers.{}.ln1", "blocks.{}.norm1"),
    ("scale", "layers.{}.ln2", "blocks.{}.norm2"),
    ("linear", "layers.{}.ffn.layers.0.0", "blocks.{}.mlp.fc1"),
    ("linear", "layers.{}.ffn.layers.1", "blocks.{}.mlp.fc2"),
    ("scale", "ln1", "norm"),
)
_MMSEG_ATTENTION: Rows = (
    ("tensor", "layers.{}.attn.attn.in_proj_weight", "blocks.{}.attn.qkv.weight"),
    ("tensor", "layers.{}.attn.attn.in_proj_bias", "blocks.{}.attn.qkv.bias"),
    ("linear", "layers.{}.attn.attn.out_proj", "blocks.{}.attn.proj"),
)
_MMPRETRAIN_ATTENTION: Rows = (
    ("linear", "layers.{}.attn.qkv", "blocks.{}.attn.qkv"),
    ("linear", "layers.{}.attn.proj", "blocks.{}.attn.proj"),
)
MMSEG_VIT = Table("mmseg-vit", (*_OPENMMLAB_VIT, *_MMSEG_ATTENTION))
MMPRETRAIN_VIT = Table("mmpretrain-vit", (*_OPENMMLAB_VIT, *_MMPRETRAIN_ATTENTION))
_TIMM_ONLY: Rows = tuple(
    ("tensor" if path.endswith(("gamma", "token")) else "scale", path, path)
    for path in ("reg_token", "blocks.{}.ls1.gamma", "blocks.{}.ls2.gamma", "norm_pre")
)
_TIMM: Rows = tuple((kind, there, there) for kind, _, there in MMPRETRAIN_VIT.rows)
TIMM_VIT = Table("timm-vit", (*_TIMM, *_TIMM_ONLY))
# DINOv2: timm's names but for the registers and, in its giant, the layers of SwiGLU (dinov2/layers/swiglu_ffn.py).
_DINOV2: Rows = (
    *(row for row in TIMM_VIT.rows if row[1] != "reg_token"),
    ("tensor", "register_tokens", "reg_token"),
)
DINOV2 = Table("dinov2", _DINOV2)
DINOV2_SWIGLU = Table(
    "dinov2-swiglu",
    (
        ("linear", "blocks.{}.mlp.w12", "blocks.{}.mlp.fc1"),
        ("linear", "blocks.{}.mlp.w3", "blocks.{}.mlp.fc2"),
        *(row for row in _DINOV2 if ".mlp." not in row[1]),
    ),
)

# Hugging Face transformers @v5.24 (and files of before it): query, key and value apart, which `joined` makes
# one. Its ViT, DeiT, ViT-MAE, ViT-MSN and I-JEPA; DeiT's distillation token is a register with a position of its own.
_HUGGINGFACE: Rows = (
    ("linear", "embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("tensor", "embeddings.cls_token", "cls_token"),
    ("tensor", "embeddings.position_embeddings", "pos_embed"),
    *(
        ("linear", f"encoder.layer.{{}}.attention.attention.{part}", f"blocks.{{}}.attn.{part[0]}")
        for part in ("query", "key", "value")
    ),
    ("linear", "encoder.layer.{}.attention.output.dense", "blocks.{}.attn.proj"),
    ("scale", "layernorm", "norm"),
)
HUGGINGFACE_VIT = Table(
    "huggingface-vit",
    (
        *_HUGGINGFACE,
        ("scale", "encoder.layer.{}.layernorm_before", "blocks.{}.norm1"),
        ("scale", "encoder.layer.{}.layernorm_after", "blocks.{}.norm2"),
        ("linear", "encoder.layer.{}.intermediate.dense", "blocks.{}.mlp.fc1"),
        ("linear", "encoder.layer.{}.output.dense", "blocks.{}.mlp.fc2"),
        ("tensor", "embeddings.distillation_token", "reg_token"),
    ),
)
_HUGGINGFACE_DINOV2: Rows = (
    *_HUGGINGFACE,
    ("tensor", "embeddings.register_tokens", "reg_token"),
    *(("scale", f"encoder.layer.{{}}.norm{n}", f"blocks.{{}}.norm{n}") for n in (1, 2)),
    *(("tensor", f"encoder.layer.{{}}.layer_scale{n}.lambda1", f"blocks.{{}}.ls{n}.gamma") for n in (1, 2)),
)
HUGGINGFACE_DINOV2 = Table(
    "huggingface-dinov2",
    (
        *_HUGGINGFACE_DINOV2,
        *(("linear", f"encoder.layer.{{}}.mlp.fc{n}", f"blocks.{{}}.mlp.fc{n}") for n in (1, 2)),
    ),
)
HUGGINGFACE_DINOV2_SWIGLU = Table(
    "huggingface-dinov2-swiglu",
    (
        ("linear", "encoder.layer.{}.mlp.weights_in", "blocks.{}.mlp.fc1"),
        ("linear", "encoder.layer.{}.mlp.weights_out", "blocks.{}.mlp.fc2"),
        *_HUGGINGFACE_DINOV2,
    ),
)
# timm's and DeiT's own names of the distilled network.
DEIT_DISTILLED = Table(
    "deit-distilled", (*(row for row in TIMM_VIT.rows if row[1] != "reg_token"), ("tensor", "dist_token", "reg_token"))
)
# DINOv3: timm's names, which are EVA's (the first row is what only these networks have), its authors' (dinov3
# models/vision_transformer.py @6876159, whose bias of the keys is masked), and transformers' (5.24).
_DINOV3 = tuple(row for row in _TIMM if row[1] not in ("pos_embed", "blocks.{}.attn.qkv"))
_ROPE: Rows = (
    *_DINOV3,
    ("tensor", "blocks.{}.attn.qkv.weight", "blocks.{}.attn.qkv.weight"),
)
TIMM_ROPE = Table(
    "timm-rope",
    (
        *(("tensor", f"blocks.{{}}.gamma_{n}", f"blocks.{{}}.gamma_{n}") for n in (1, 2)),
        *_ROPE,
        ("tensor", "reg_token", "reg_token"),
        *(("tensor", f"blocks.{{}}.attn.{part}_bias", f"blocks.{{}}.attn.{part}_bias") for part in "qv"),
        *(("linear", f"blocks.{{}}.mlp.fc1_{part}", f"blocks.{{}}.mlp.fc1_{part}") for part in "gx"),
    ),
)
DINOV3 = Table(
    "dinov3",
    (
        ("tensor", "storage_tokens", "reg_token"),
        *(("tensor", f"blocks.{{}}.ls{n}.gamma", f"blocks.{{}}.gamma_{n}") for n in (1, 2)),
        *(row for row in _ROPE if ".mlp.fc2" not in row[1]),
        ("linear", "blocks.{}.mlp.fc2", "blocks.{}.mlp.fc2"),
        ("tensor", "blocks.{}.attn.qkv.bias", "blocks.{}.attn.qkv_bias"),
    ),
)
DINOV3_SWIGLU = Table(
    "dinov3-swiglu",
    (
        *(("linear", f"blocks.{{}}.mlp.w{n}", f"blocks.{{}}.mlp.{ours}") for n, ours in ((1, "fc1_g"), (2, "fc1_x"))),
        ("linear", "blocks.{}.mlp.w3", "blocks.{}.mlp.fc2"),
        *(row for row in DINOV3.rows if ".mlp." not in row[1]),
    ),
)
_HUGGINGFACE_DINOV3: Rows = (
    ("linear", "embeddings.patch_embeddings", "patch_embed.proj"),
    ("tensor", "embeddings.cls_token", "cls_token"),
    ("tensor", "embeddings.register_tokens", "reg_token"),
    *(("scale", f"layer.{{}}.norm{n}", f"blocks.{{}}.norm{n}") for n in (1, 2)),
    *(("tensor", f"layer.{{}}.layer_scale{n}.lambda1", f"blocks.{{}}.gamma_{n}") for n in (1, 2)),
    *(("tensor", f"layer.{{}}.attention.{part}_proj.weight", f"blocks.{{}}.attn.{part}.weight") for part in "qkv"),
    *(("tensor", f"layer.{{}}.attention.{part}_proj.bias", f"blocks.{{}}.attn.{part}_bias") for part in "qv"),
    ("linear", "layer.{}.attention.o_proj", "blocks.{}.attn.proj"),
    ("linear", "layer.{}.mlp.down_proj", "blocks.{}.mlp.fc2"),
    ("scale", "norm", "norm"),
)

HUGGINGFACE_DINOV3 = Table(
    "huggingface-dinov3", (*_HUGGINGFACE_DINOV3, ("linear", "layer.{}.mlp.up_proj", "blocks.{}.mlp.fc1"))
)
HUGGINGFACE_DINOV3_SWIGLU = Table(
    "huggingface-dinov3-swiglu",
    (
        ("linear", "layer.{}.mlp.gate_proj", "blocks.{}.mlp.fc1_g"),
        ("linear", "layer.{}.mlp.up_proj", "blocks.{}.mlp.fc1_x"),
        *_HUGGINGFACE_DINOV3,
    ),
)

_RESNETS = (TORCHVISION, DETECTRON2, SEQUENTIAL, HUGGINGFACE_RESNET, SIMCLR_V2, HAIKU, CAFFE2)
_HUGGINGFACE_VITS = (HUGGINGFACE_VIT, HUGGINGFACE_DINOV2, HUGGINGFACE_DINOV2_SWIGLU)
VIT_TABLES = (
    TIMM_ROPE,
    DINOV3_SWIGLU,
    DINOV3,
    HUGGINGFACE_DINOV3_SWIGLU,
    HUGGINGFACE_DINOV3,
    MMSEG_VIT,
    MMPRETRAIN_VIT,
    TIMM_VIT,
    DINOV2,
    DINOV2_SWIGLU,
    DEIT_DISTILLED,
    *_HUGGINGFACE_VITS,
)
TABLES = {table.name: table for table in (*_RESNETS, *VIT_TABLES)}
