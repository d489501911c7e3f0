# The MoCo paper's head (arXiv 1911.05722, App. A.5): conv5 with 3×3 dilation 2 and stride 1 (output stride 16), two 3×3
# convolutions of 256 channels with dilation 6, then 1×1; no auxiliary head, no dropout.
# Source of the MMSegmentation form: CVMI-Lab/SlotCon @30ff33d, transfer/segmentation/configs/*/fcn_d6_r50-d16_*_moco.py.
# (Its data files normalise 0–255 images with statistics of [0, 1]: not copied; mean and std come with the weights.)
_base_ = './_fcn_r50_d8.py'
model = dict(
    backbone=dict(dilations=(1, 1, 1, 2), strides=(1, 2, 2, 1)),
    decode_head=dict(
        channels=256, num_convs=2, concat_input=False, dropout_ratio=0.0, dilation=6, align_corners=True),
    auxiliary_head=None)
