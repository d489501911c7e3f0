# twist transfer ade20k-fcn-d8-80k --weights FILE --data ROOT
# 4 GPUs × 4 images (hours not measured) · no verified published number for self-supervised weights
# Source: MMSegmentation, installed: configs/fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py (there with a deep stem).
_base_ = [
    './_fcn_r50_d8.py', '{{$MMSEG_CONFIGS:}}/_base_/datasets/ade20k.py', './_schedule_poly.py', './_runtime.py'
]
data_preprocessor = dict(size=(512, 512))
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150))
train_dataloader = dict(batch_size=4)
param_scheduler = [dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=80000, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=80000, val_interval=80000)
