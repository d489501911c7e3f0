# twist transfer cityscapes-fcn-d16-90k --weights FILE --data ROOT
# 2 GPUs × 8 images (hours not measured) · expected: MoCo v2 75.7 mIoU (DetCo Table 7; others report about 67)
# Source: MoCo paper App. A.5 in the form of SlotCon @30ff33d, fcn_d6_r50-d16_769x769_90k_cityscapes_moco.py.
_base_ = [
    './_fcn_r50_d16.py', '{{$MMSEG_CONFIGS:}}/_base_/datasets/cityscapes_769x769.py', './_schedule_step.py',
    './_runtime.py'
]
crop_size = (769, 769)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(num_classes=19),
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(513, 513)))
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(2049, 1025), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs')
]
train_dataloader = dict(batch_size=8, dataset=dict(pipeline=train_pipeline))
param_scheduler = [dict(type='MultiStepLR', milestones=[63000, 81000], gamma=0.1, begin=0, end=90000, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=90000, val_interval=90000)
