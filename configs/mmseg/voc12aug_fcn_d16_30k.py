# twist transfer voc12aug-fcn-d16-30k --weights FILE --data ROOT
# 2 GPUs × 8 images (hours not measured) · expected: MoCo 72.5 mIoU, BYOL 76.3 (BYOL Table 4)
# Source: MoCo paper App. A.5 in the form of SlotCon @30ff33d, fcn_d6_r50-d16_513x513_30k_voc12aug_moco.py.
_base_ = ['./_fcn_r50_d16.py', './_voc12aug.py', './_schedule_step.py', './_runtime.py']
crop_size = (513, 513)
data_preprocessor = dict(size=crop_size)
model = dict(data_preprocessor=data_preprocessor, decode_head=dict(num_classes=21))
# No colour distortion and no limit on one class's share of a crop: scale, crop and flip only.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(2049, 513), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs')
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2049, 513), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs')
]
train_dataloader = dict(batch_size=8, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
optim_wrapper = dict(optimizer=dict(lr=0.003))
param_scheduler = [dict(type='MultiStepLR', milestones=[21000, 27000], gamma=0.1, begin=0, end=30000, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=30000, val_interval=30000)
