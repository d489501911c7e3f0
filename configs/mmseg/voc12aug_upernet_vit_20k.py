# twist transfer voc12aug-upernet-vit-20k --weights FILE --data ROOT
# 8 GPUs × 2 images (hours not measured) · no verified published number for self-supervised weights
# Ours: the model and the optimiser of ade20k_upernet_vit_160k.py on the data and length of voc12aug_fcn_d8_20k.py.
_base_ = ['./_upernet_vit.py', './_voc12aug.py', './_runtime.py']
data_preprocessor = dict(size=(512, 512))
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(num_classes=21),
    auxiliary_head=dict(num_classes=21))
train_dataloader = dict(batch_size=2)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=1500, end=20000, by_epoch=False)
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=20000, val_interval=20000)
