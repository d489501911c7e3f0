# twist transfer cityscapes-upernet-vit-40k --weights FILE --data ROOT
# 8 GPUs × 1 image (hours not measured) · no verified published number for self-supervised weights
# Ours: the model and the optimiser of ade20k_upernet_vit_160k.py for 40k iterations on MMSegmentation's
# cityscapes_768x768.py; crops, windows and images a step are those of its configs/setr on Cityscapes.
_base_ = ['./_upernet_vit.py', '{{$MMSEG_CONFIGS:}}/_base_/datasets/cityscapes_768x768.py', './_runtime.py']
data_preprocessor = dict(size=(768, 768))
model = dict(
    data_preprocessor=data_preprocessor,
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19),
    test_cfg=dict(mode='slide', crop_size=(768, 768), stride=(512, 512)))
train_dataloader = dict(batch_size=1)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=1500, end=40000, by_epoch=False)
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=40000, val_interval=40000)
