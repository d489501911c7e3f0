# twist transfer voc12aug-fcn-d8-20k --weights FILE --data ROOT
# 4 GPUs × 4 images (hours not measured) · expected: MoCo v2 200 ep 67.55 mIoU, BYOL 200 ep 67.16 (mmselfsup READMEs)
# Source: DenseCL @b64bbb6 and mmselfsup @80bb3f45, fcn_r50-d8_512x512_20k_voc12aug.py.
_base_ = ['./_fcn_r50_d8.py', './_voc12aug.py', './_schedule_poly.py', './_runtime.py']
data_preprocessor = dict(size=(512, 512))
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(num_classes=21),
    auxiliary_head=dict(num_classes=21))
train_dataloader = dict(batch_size=4)
param_scheduler = [dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=20000, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=20000, val_interval=20000)
