# UPerNet on a plain ViT as MMSegmentation runs it: four blocks, a neck that scales them by 4, 2, 1 and 1/2, an auxiliary
# FCN head, AdamW without decay of norms and positions. The engine fits widths to the weights and takes the backbone that
# computes what they do (MMSegmentation's own, or TwistVisionTransformer), the last block after its norm.
# Source: MMSegmentation, installed: configs/vit/vit_{deit-s16,vit-b16}-ln_mln_upernet_8xb2-160k_ade20k-512x512.py.
_base_ = '{{$MMSEG_CONFIGS:}}/_base_/models/upernet_vit-b16_ln_mln.py'
model = dict(pretrained=None, backbone=dict(drop_path_rate=0.1))
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=0.00006, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(
        custom_keys={
            'pos_embed': dict(decay_mult=0.),
            'cls_token': dict(decay_mult=0.),
            'norm': dict(decay_mult=0.)
        }))
