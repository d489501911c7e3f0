"""Every checkpoint layout of the field, as data: where the backbone is, which branch to take, what is dropped.

Patterns are shell globs (`a|b`: either) on names without their `module.` and `_orig_mod.` parts. The first layout
whose evidence is in the file is taken, so the particular stand before the general; `--from NAME` forces one. Read from
the projects' own code at the commits given in the notes; where two sources of the same shape want different pixels or
padding, nothing is guessed and the user is asked (`AMBIGUOUS`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from twist.contracts.rename import Table
from twist.contracts.weights import IMAGENET_MEAN, IMAGENET_STD
from twist.converters.tables import (
    CAFFE2,
    DETECTRON2,
    HAIKU,
    MMPRETRAIN_VIT,
    MMSEG_VIT,
    SEQUENTIAL,
    SIMCLR_V2,
    TIMM_VIT,
)
from twist.converters.tables import TORCHVISION as TV

Triple = tuple[float, float, float]
PLAIN = (TV, TIMM_VIT)
STATE, MODEL, ROOT = ("state_dict",), ("model",), ()


@dataclass(frozen=True)
class Pixels:
    """What the network was fed: order, and mean and std in units of `input_range`."""

    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    channel_order: Literal["RGB", "BGR"] = "RGB"
    input_range: Literal[1, 255] = 1


IMAGENET = Pixels()
SWAV = Pixels(std=(0.228, 0.224, 0.225))  # swav src/multicropdataset.py
UNIT = Pixels(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))  # SimCLR: [0, 1] and nothing else
HALF = Pixels(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))  # the original ViTs of JAX (timm's augreg)
# detectron2 config/defaults.py: Caffe's statistics, the scale absorbed in conv1.
MSRA = Pixels(mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0), channel_order="BGR", input_range=255)


@dataclass(frozen=True)
class Branch:
    """One network in the file: the entry that holds its state dict, and the prefix of its names there."""

    name: str
    entry: tuple[str, ...]
    prefix: str


@dataclass(frozen=True)
class Layout:
    """One row. Several branches of one name are alternatives; the first branch present is the default."""

    name: str
    method: str
    branches: tuple[Branch, ...]
    evidence: tuple[str, ...] = ()  # each must match a name in the state dict
    top: tuple[str, ...] = ()  # entries the file must have
    heads: tuple[str, ...] = ()  # dropped, below the branch's prefix
    drop: tuple[str, ...] = ()  # dropped, in the state dict
    entries: tuple[str, ...] = ()  # other entries with tensors that are left aside
    tables: tuple[Table, ...] = PLAIN
    pixels: Pixels = IMAGENET
    stride_in: Literal["3x3", "1x1"] = "3x3"
    padding: Literal["symmetric", "same"] = "symmetric"
    method_at: tuple[str, ...] = ()  # where the program's settings name the method, when they are in the file
    heads_known: bool = False  # a ViT-S of this layout has the usual 6 attention heads (`converters/settings.py`)
    epoch_is_count: bool = False  # `epoch` holds the number of finished epochs
    detect: bool = True  # False: content cannot tell, only --from can
    lookalikes: str = ""  # other methods whose files hold the same names, where neither content nor custom tells
    refuse: tuple[tuple[str, str], ...] = ()  # architecture → why it is not this suite's network of that name
    note: str = ""


def _one(entry: tuple[str, ...], *prefixes: str, name: str = "backbone") -> tuple[Branch, ...]:
    return tuple(Branch(name, entry, prefix) for prefix in prefixes)


FC = ("fc.*",)
VIT_HEADS = ("head.*", "head_dist.*", "pre_logits.*", "fc_norm.*")
MOMENTUM_DROP = ("neck.*", "head.*", "queue*", "encoder_q.*", "encoder_k.*", "momentum_encoder.*")

# Entries that training scripts keep beside the network; nothing in them is a backbone.
TRAINING_ENTRIES = (
    "optimizer*", "optim", "scaler", "amp", "lr_scheduler*", "scheduler", "*_scheduler", "loops",
    "callbacks", "hparams*", "hyper_parameters", "args", "opt", "config", "epoch", "iteration", "rng*", "*loss*",
    "meta", "message_hub",
    "param_schedulers", "ema_*optimizer*", "best_*", "*acc*", "fp16_scaler", "__author__", "matching_heuristics",
    "MixedPrecision*", "NativeMixedPrecision*", "datamodule*", "sampler*", "prng*", "random*", "step", "rng_state",
)  # fmt: skip

LAYOUTS: tuple[Layout, ...] = (
    # ---- whole training files, recognisable by their entries -------------------------------------------------------
    Layout(
        "twist", "twist",
        (Branch("teacher", ("teacher_backbone",), ""), Branch("student", ("backbone",), "")),
        top=("backbone", "model"), heads=(*FC, *VIT_HEADS), entries=("model", "teacher"), heads_known=True,
        note="TWIST train.py @796d36e; with a momentum encoder the teacher is the network that was evaluated",
    ),
    Layout(
        "twist-run", "twist",
        (Branch("teacher", ("teacher",), "backbone."), Branch("student", MODEL, "backbone.")),
        top=("model", "teacher", "nonfinite"), heads=FC, drop=("head.*",), entries=("nonfinite",), heads_known=True,
        note="this suite's own resume states (pretrain/run.py); backbone.safetensors beside them says more",
    ),
    Layout(
        "ibot", "ibot",
        (Branch("teacher", ("teacher",), "backbone."), Branch("student", ("student",), "backbone.")),
        top=("teacher", "student", "ibot_loss"), heads=(*FC, "head.*", "masked_embed"), drop=("head.*",),
        heads_known=True, note="ibot main_ibot.py, models/vision_transformer.py",
    ),
    Layout(
        "dino", "dino",
        (Branch("teacher", ("teacher",), "backbone."), Branch("student", ("student",), "backbone.")),
        top=("teacher", "student"), heads=(*FC, "head.*"), drop=("head.*",), heads_known=True,
        note="dino main_dino.py, utils.py",
    ),
    Layout(
        "byol-deepmind", "byol",
        (
            Branch("online", ("experiment_state", "online"), ""),
            Branch("target", ("experiment_state", "target"), ""),
        ),
        top=("experiment_state",), drop=("projector/*", "predictor/*", "classifier/*"),
        tables=(HAIKU,), padding="same",
        note="deepmind-research byol/byol_experiment.py @4822a45, byol-convert convert.py",
    ),
    Layout(
        "vissl", "vissl",
        _one(("classy_state_dict", "base_model", "model", "trunk"), "_feature_blocks.", "base_model._feature_blocks.")
        + _one(("model_state_dict",), "_feature_blocks.") + _one(("trunk",), "_feature_blocks."),
        evidence=("*_feature_blocks.*",), heads=FC,
        note="vissl extra_scripts/convert_vissl_to_torchvision.py @09270ed2",
    ),
    Layout(
        "pycontrast-infomin", "infomin",
        (Branch("query", MODEL, "encoder."), Branch("ema", ("model_ema",), "encoder.")),
        top=("model", "contrast", "model_ema"), evidence=("head_jig.*",), heads=FC, drop=("head.*", "head_jig.*"),
        entries=("contrast",),
        note="PyContrast detection/convert_pretrained.py @84f94ea: its method with both jigsaw and a moving average",
    ),
    Layout(
        "pycontrast", "unknown",
        (Branch("query", MODEL, "encoder."), Branch("ema", ("model_ema",), "encoder.")),
        top=("model", "contrast"), heads=FC, drop=("head*.*",), entries=("contrast",),
        note="PyContrast learning/contrast_trainer.py @84f94ea: InsDis, MoCo, MoCo v2 and PIRL, of which none says so",
    ),
    Layout(
        "simclr-v2-torch", "simclr-v2", _one(("resnet",), ""),
        top=("resnet", "head"), drop=FC, entries=("head",), tables=(SIMCLR_V2,), pixels=UNIT,
        note="Separius/SimCLRv2-Pytorch convert.py @46ad293; only the sk0 networks are plain ResNets",
    ),
    # ---- `model` -----------------------------------------------------------------------------------------------------
    Layout(
        "slotcon", "slotcon",
        (Branch("key", MODEL, "encoder_k."), Branch("query", MODEL, "encoder_q.")),
        evidence=("grouping_k.*",), heads=FC,
        drop=("projector_?.*", "grouping_?.*", "predictor_slot.*", "center"),
        note="SlotCon models/slotcon.py, transfer/detection/convert_pretrain_to_d2.py @d510e65: the key encoder",
    ),
    Layout(
        "soco", "soco",
        (
            Branch("query", MODEL, "encoder."), Branch("ema", ("model_ema",), "encoder."),
            Branch("key", MODEL, "encoder_k."),
        ),
        evidence=("encoder_k.*", "projector_k.*", "predictor.*"), heads=FC,
        drop=("neck.*", "neck_k.*", "head.*", "head_k.*", "projector.*", "projector_k.*", "predictor.*",
              "encoder*.fc.*"),
        note="SoCo contrast/models/SoCo_FPN.py, converter_detectron2 @624a70d",
    ),
    Layout(
        "pixpro", "pixpro",
        (Branch("query", MODEL, "encoder."), Branch("key", MODEL, "encoder_k.")),
        evidence=("encoder_k.*", "projector_k.*"), heads=FC,
        drop=("projector.*", "projector_k.*", "value_transform.*", "encoder*.fc.*"),
        note="PixPro transfer/detection/convert_pretrain_to_d2.py @e390d6b",
    ),
    Layout(
        "barlow-twins", "barlow-twins", _one(MODEL, "backbone."),
        evidence=("projector.*", "bn.running_mean"), heads=FC, drop=("projector.*", "bn.*"), note="barlowtwins main.py",
    ),
    Layout(
        "vicreg", "vicreg", _one(MODEL, "backbone."), evidence=("projector.*",), heads=FC, drop=("projector.*",),
        note="vicreg main_vicreg.py, hubconf.py",
    ),
    # ---- `state_dict` with several encoders ----------------------------------------------------------------
    Layout(
        "moco-v3", "moco-v3",
        (Branch("query", STATE, "base_encoder."), Branch("key", STATE, "momentum_encoder.")),
        evidence=("base_encoder.*",), heads=(*FC, "head.*"), drop=("*_encoder.fc.*", "*_encoder.head.*", "predictor.*"),
        epoch_is_count=True, note="moco-v3 main_lincls.py, vits.py @1c6b717",
        refuse=(("vit_small_patch16", "MoCo v3's ViT-S has 12 heads (vits.py), the usual ViT-S/16 has 6"),),
    ),
    Layout(
        "densecl", "densecl",
        (
            Branch("query", STATE, "backbone."), Branch("query", STATE, "encoder_q.0."),
            Branch("key", STATE, "encoder_k.0."),
        ),
        evidence=("queue2",), heads=FC, drop=MOMENTUM_DROP, note="DenseCL openselfsup/models/densecl.py @b64bbb6",
    ),
    Layout(
        "detco", "detco",
        (Branch("query", STATE, "encoder_q."), Branch("key", STATE, "encoder_k.")),
        evidence=("encoder_q.*mlp*",), heads=(*FC, "*mlp*", "*layers*"), drop=("encoder_?.*mlp*", "*layers*", "queue*",
        "encoder_?.fc.*"), note="DetCo converter @adf4947",
    ),
    Layout(
        "openselfsup-moco", "moco-v2",
        (
            Branch("query", STATE, "backbone."), Branch("query", STATE, "encoder_q.0."),
            Branch("key", STATE, "encoder_k.0."), Branch("key", STATE, "encoder_k.module.0."),
        ),
        evidence=("encoder_k.*", "queue*"), heads=FC, drop=MOMENTUM_DROP, tables=(TV, MMPRETRAIN_VIT),
        note="OpenSelfSup moco.py @1db69ec, mmselfsup @6faad816 / @80bb3f45, mmpretrain",
    ),
    Layout(
        "moco", "moco-v2",
        (Branch("query", STATE, "encoder_q."), Branch("key", STATE, "encoder_k.")),
        evidence=("encoder_q.fc.2.*",), heads=FC, drop=("encoder_?.fc.*", "queue*"), epoch_is_count=True,
        note="moco main_lincls.py @132aea9; also PCL v2: name it with --from pcl",
    ),
    Layout(
        "moco-v1", "moco-v1",
        (Branch("query", STATE, "encoder_q."), Branch("key", STATE, "encoder_k.")),
        evidence=("encoder_q.*",), heads=FC, drop=("encoder_?.fc.*", "queue*"), epoch_is_count=True,
        note="moco main_lincls.py @132aea9",
    ),
    Layout(
        "openselfsup-byol", "byol",
        (
            Branch("online", STATE, "backbone."), Branch("online", STATE, "online_net.0."),
            Branch("target", STATE, "target_net.0."), Branch("target", STATE, "target_net.module.0."),
        ),
        evidence=("target_net.*",), heads=FC, tables=(TV, MMPRETRAIN_VIT),
        drop=("neck.*", "head.*", "online_net.*", "target_net.*"),
        note="OpenSelfSup byol.py @1db69ec, mmselfsup 0.x and 1.x, mmpretrain",
    ),
    Layout(
        "simsiam", "simsiam", _one(STATE, "encoder."),
        evidence=("encoder.fc.*", "predictor.*"), heads=FC, drop=("predictor.*",), epoch_is_count=True,
        note="simsiam main_lincls.py",
    ),
    # ---- lightly (its benchmark modules, @e8d317fc) and solo-learn ---------------------------------------------------
    Layout(
        "lightly-dino", "dino",
        (Branch("teacher", STATE, "backbone."), Branch("student", STATE, "student_backbone.")),
        evidence=("student_backbone.*", "*_head.*"), tables=(TV, SEQUENTIAL, TIMM_VIT),
        drop=("*head.*", "criterion.*", "online_classifier.*"),
        note="lightly benchmarks/imagenet/resnet50/dino.py: `backbone` is the teacher",
    ),
    Layout(
        "lightly-byol", "byol",
        (
            Branch("online", STATE, "backbone."), Branch("target", STATE, "teacher_backbone."),
            Branch("target", STATE, "backbone_momentum."),
        ),
        evidence=("prediction_head.*", "teacher_backbone.*|backbone_momentum.*"), tables=(TV, SEQUENTIAL, TIMM_VIT),
        drop=("*head.*", "*head_momentum.*", "criterion.*", "online_classifier.*"), note="lightly byol.py",
    ),
    Layout(
        "lightly-simsiam", "simsiam", _one(STATE, "backbone."),
        evidence=("prediction_head.*", "projection_head.*"), tables=(TV, SEQUENTIAL, TIMM_VIT),
        drop=("*head.*", "criterion.*", "online_classifier.*"), note="lightly simsiam.py",
    ),
    Layout(
        "lightly-moco", "moco-v2",
        (
            Branch("query", STATE, "backbone."), Branch("query", STATE, "query_backbone."),
            Branch("key", STATE, "key_backbone."), Branch("key", STATE, "backbone_momentum."),
        ),
        evidence=(
            "*projection_head.*", "key_backbone.*|backbone_momentum.*",
            # MoCo's head has no batch norm, so that its second layer is the third module; TiCo's is the fourth.
            "key_backbone.*|criterion.*bank*|projection_head.layers.2.weight",
        ),
        tables=(TV, SEQUENTIAL, TIMM_VIT),
        drop=("*head.*", "*head_momentum.*", "criterion.*", "online_classifier.*"), note="lightly moco.py, mocov2.py",
    ),
    Layout(
        "lightly-moco-query", "moco-v2",
        (Branch("query", STATE, "query_backbone."), Branch("key", STATE, "backbone.")),
        evidence=("query_backbone.*", "query_projection_head.*"), tables=(TV, SEQUENTIAL, TIMM_VIT),
        drop=("*head.*", "criterion.*", "online_classifier.*"),
        note="lightly mocov2.py @00283d72: `backbone` is the moving average",
    ),
    Layout(
        "lightly-momentum", "unknown",
        (Branch("query", STATE, "backbone."), Branch("key", STATE, "backbone_momentum.")),
        evidence=("projection_head.*", "backbone_momentum.*"), tables=(TV, SEQUENTIAL, TIMM_VIT),
        drop=("*head.*", "*head_momentum.*", "criterion.*", "online_classifier.*"),
        note="lightly tico.py, and whatever has its names",
    ),
    Layout(
        "lightly-swav", "swav", _one(STATE, "backbone."),
        evidence=("prototypes.*", "projection_head.*"), tables=(TV, SEQUENTIAL, TIMM_VIT),
        drop=("*head.*", "prototypes.*", "criterion.*", "online_classifier.*", "queue*", "start_queue*"),
        note="lightly swav.py",
    ),
    Layout(
        "lightly", "unknown", _one(STATE, "backbone."),
        evidence=("projection_head.*",), tables=(TV, SEQUENTIAL, TIMM_VIT),
        drop=("*head.*", "criterion.*", "online_classifier.*"), note="lightly simclr.py, barlowtwins.py, vicreg.py, …",
    ),
    Layout(
        "solo-learn", "unknown",
        (
            Branch("backbone", STATE, "backbone."), Branch("backbone", STATE, "encoder."),
            Branch("momentum", STATE, "momentum_backbone."), Branch("momentum", STATE, "momentum_encoder."),
        ),
        evidence=("classifier.*",), heads=FC,
        drop=("classifier.*", "momentum_classifier.*", "*projector.*", "*predictor.*", "prototypes*", "queue*",
              "*loss*", "*head.*"),
        method_at=("hyper_parameters", "method"),
        note="solo-learn downstream/object_detection/convert_model_to_detectron2.py @9187ea3",
    ),
    Layout(
        "self-classifier", "self-classifier", _one(STATE, "backbone."),
        evidence=("cls_0",), heads=FC, drop=("cls_*",), note="self-classifier src/model.py @a2ba65c",
    ),
    Layout(
        "instance-loc", "instance-loc",
        (Branch("query", STATE, "backbone."), Branch("key", STATE, "backbone_k.")),
        evidence=("backbone_k.*",), heads=FC,
        drop=("neck*.*", "roi_head*.*", "rpn_head*.*", "queue*"), note="InstanceLoc insloc_fpn.py @2ae154a",
    ),
    # ---- OpenMMLab in general, and a segmentor back again --------------------------------------------------
    Layout(
        "mmseg", "unknown", _one(STATE, "backbone."),
        evidence=("decode_head.*",), heads=FC, drop=("decode_head.*", "auxiliary_head.*"), tables=(TV, MMSEG_VIT),
        note="a trained MMSegmentation model back again",
    ),
    Layout(
        "mmselfsup", "unknown", _one(STATE, "backbone.", "encoder.0."),
        top=("meta",), heads=FC, drop=("neck.*", "head.*", "data_preprocessor.*", "encoder.1.*", "target_generator.*"),
        tables=(TV, MMPRETRAIN_VIT), note="mmselfsup 0.x / 1.x and mmpretrain: SimCLR, SimSiam, SwAV, Barlow Twins, …",
    ),
    # ---- SwAV: torchvision's names beside its heads --------------------------------------------------------
    Layout(
        "deepcluster-v2", "deepcluster-v2", _one(ROOT, "") + _one(STATE, ""),
        evidence=("prototypes.prototypes0.*",), drop=("projection_head.*", "prototypes.*"), pixels=SWAV,
        epoch_is_count=True, note="swav main_deepclusterv2.py; SeLa v2 has the same names: name it with --from sela-v2",
        lookalikes="SeLa v2 (sela-v2) and of SwAV with several heads (swav)",
    ),
    Layout(
        "swav", "swav", _one(ROOT, "") + _one(STATE, ""),
        evidence=("projection_head.*",), drop=("projection_head.*", "prototypes.*"), pixels=SWAV, epoch_is_count=True,
        note="swav hubconf.py, src/resnet50.py (padding 2 + 1 is the usual 3)",
    ),
    # ---- Detectron2 back again -----------------------------------------------------------------------------
    Layout(
        "detectron2-caffe2", "supervised", _one(ROOT, "") + _one(("blobs",), ""),
        evidence=("res2_0_branch2a_w",), drop=("fc1000_*", "pred_*", "*_momentum"), tables=(CAFFE2,), pixels=MSRA,
        stride_in="1x1", note="detectron2 checkpoint/c2_model_loading.py: MSRA's ResNets under Caffe2 names",
    ),
    Layout(
        "detectron2", "unknown", _one(MODEL, ""), top=("__author__",), evidence=("stem.conv1.*",), drop=("fc.*",),
        tables=(DETECTRON2,), note="what the field's converters (and torchvision-to-d2) write: RGB, stride in the 3×3",
    ),
    # ---- plain names ---------------------------------------------------------------------------------------
    Layout(
        "backbone-entry", "unknown", _one(("backbone",), ""), top=("backbone",), drop=(*FC, *VIT_HEADS),
        note="a bare backbone under `backbone`: which method made it is not in it",
    ),
    Layout(
        "model-entry", "unknown", _one(MODEL, ""), evidence=("conv1.weight|patch_embed.proj.weight",),
        drop=(*FC, *VIT_HEADS, "mask_token", "decoder_*"),
        note="plain names under `model`: DeiT, MAE, torchvision's references; which method made it is not in it",
    ),
    Layout(
        "torchvision-training", "supervised", _one(STATE, ""), top=("arch", "optimizer"), evidence=("fc.*",), drop=FC,
        epoch_is_count=True, note="torchvision's and PyTorch's ImageNet example",
    ),
    Layout(
        "torchvision", "supervised", _one(ROOT, ""), evidence=("fc.*", "bn1.*"), drop=FC,
        note="torchvision, timm ResNets",
    ),
    Layout(
        "backbone", "unknown", _one(ROOT, "") + _one(STATE, ""),
        note="a bare backbone: which method made it is not in it",
    ),
    Layout("backbone-prefixed", "unknown", _one(ROOT, "backbone.", "encoder."), drop=FC, note="the same with a prefix"),
    # ---- only by name: same shape as another, other meaning ------------------------------------------------
    Layout("twist-backbone", "twist", _one(ROOT, ""), detect=False, note="TWIST evaluate.py"),
    Layout("dino-backbone", "dino", _one(ROOT, ""), detect=False, heads_known=True, note="dino hubconf.py"),
    Layout("mae", "mae", _one(MODEL, ""), drop=(*FC, *VIT_HEADS, "mask_token", "decoder_*"), detect=False,
    note="mae models_mae.py, models_vit.py"),
    Layout("barlow-twins-backbone", "barlow-twins", _one(ROOT, ""), detect=False, note="barlowtwins hubconf.py"),
    Layout("vicreg-backbone", "vicreg", _one(ROOT, ""), detect=False, note="vicreg hubconf.py"),
    Layout("densecl-backbone", "densecl", _one(STATE, ""), detect=False,
    note="DenseCL tools/extract_backbone_weights.py"),
    Layout("detco-backbone", "detco", _one(STATE, ""), drop=("*mlp*", "*layers*", "fc.*"), detect=False, note="DetCo"),
    Layout(
        "byol-torch", "byol", _one(STATE, "") + _one(ROOT, ""), drop=FC, padding="same", detect=False,
        note="ajtejankar/byol-convert, ssl-transfer",
    ),
    Layout(
        "simclr-torch", "simclr", _one(STATE, "") + _one(ROOT, ""), drop=FC, pixels=UNIT, detect=False,
        note="tonylins/simclr-converter",
    ),
    Layout(
        "pcl", "pcl", (Branch("query", STATE, "encoder_q."), Branch("key", STATE, "encoder_k.")),
        heads=FC, drop=("encoder_?.fc.*", "queue*"), detect=False, epoch_is_count=True, note="PCL main_pcl.py",
    ),
    Layout(
        "sela-v2", "sela-v2", _one(ROOT, "") + _one(STATE, ""), drop=("projection_head.*", "prototypes.*"), pixels=SWAV,
        detect=False, note="swav main_sela.py",
    ),
    Layout("timm", "supervised", _one(ROOT, ""), drop=(*FC, *VIT_HEADS), detect=False, heads_known=True,
    note="timm with ImageNet's mean and std"),
    Layout(
        "timm-half", "supervised", _one(ROOT, ""), drop=(*FC, *VIT_HEADS), pixels=HALF, detect=False, heads_known=True,
        note="timm's augreg ViTs: mean and std 0.5",
    ),
    Layout(
        "detectron2-model", "unknown", _one(MODEL, "backbone.bottom_up.", "")
        + _one(ROOT, "backbone.bottom_up."),
        drop=("backbone.fpn_*", "proposal_generator.*", "roi_heads.*", "pixel_*", "anchor_generator.*"),
        tables=(DETECTRON2,), detect=False, note="a detector trained with RGB and the stride in the 3×3",
    ),
    Layout(
        "detectron2-msra", "supervised", _one(MODEL, "backbone.bottom_up.", "") + _one(ROOT, ""),
        drop=("backbone.fpn_*", "proposal_generator.*", "roi_heads.*", "pixel_*", "fc.*"), tables=(DETECTRON2,),
        pixels=MSRA,
        stride_in="1x1", detect=False, note="Detectron2's own ImageNet backbones and what was trained from them",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Ambiguous:
    """Files that hold too little to know their pixels or padding: which layouts they may be."""

    entry: tuple[str, ...]
    evidence: tuple[str, ...]
    top: tuple[str, ...]
    absent: tuple[str, ...]
    choices: tuple[str, ...]
    why: str


AMBIGUOUS: tuple[Ambiguous, ...] = (
    Ambiguous(
        STATE, ("conv1.weight", "fc.*"), ("state_dict",), ("arch", "optimizer"),
        ("simclr-torch", "byol-torch", "torchvision-training"),
        "SimCLR's, BYOL's and supervised conversions look the same but want other pixels and padding",
    ),
    Ambiguous(
        ROOT, ("patch_embed.proj.weight", "head.weight"), (), ("state_dict",), ("timm", "timm-half"),
        "timm's ViTs with a classifier were trained on ImageNet's mean and std or on 0.5",
    ),
    Ambiguous(
        MODEL, ("backbone.bottom_up.stem.conv1.*",), ("model",), (), ("detectron2-model", "detectron2-msra"),
        "a detector's weights do not say its pixel order, mean and stride",
    ),
)  # fmt: skip

BY_NAME = {layout.name: layout for layout in LAYOUTS}
