# twist transfer cityscapes-fcn-d8-40k --weights FILE --data ROOT
# 4 GPUs × 2 images (hours not measured) · no verified published number for self-supervised weights
# Source: DenseCL @b64bbb6 and mmselfsup @80bb3f45, fcn_r50-d8_769x769_40k_cityscapes.py.
_base_ = [
    './_fcn_r50_d8.py', '{{$MMSEG_CONFIGS:}}/_base_/datasets/cityscapes_769x769.py', './_schedule_poly.py',
    './_runtime.py'
]
data_preprocessor = dict(size=(769, 769))
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(num_classes=19, align_corners=True),
    auxiliary_head=dict(num_classes=19, align_corners=True),
    test_cfg=dict(mode='slide', crop_size=(769, 769), stride=(513, 513)))
train_dataloader = dict(batch_size=2)
param_scheduler = [dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=40000, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=40000, val_interval=40000)
