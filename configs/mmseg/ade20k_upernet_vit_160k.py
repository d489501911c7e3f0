# twist transfer ade20k-upernet-vit-160k --weights FILE --data ROOT
# 8 GPUs × 2 images (hours not measured) · expected: supervised DeiT-S 43.52 mIoU, DeiT-B 45.37 (vit/metafile.yaml)
# Source: MMSegmentation, installed: configs/vit/vit_deit-s16-ln_mln_upernet_8xb2-160k_ade20k-512x512.py.
_base_ = ['./_upernet_vit.py', '{{$MMSEG_CONFIGS:}}/_base_/datasets/ade20k.py', './_runtime.py']
data_preprocessor = dict(size=(512, 512))
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150))
train_dataloader = dict(batch_size=2)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=1500, end=160000, by_epoch=False)
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=160000)
