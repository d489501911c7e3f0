# FCN on a ResNet with output stride 8, as DenseCL's fork and mmselfsup 0.x run it: MMSegmentation's own model with the
# torchvision stem. The stock file has the deep-stem ResNetV1c and its supervised weights, into which no self-supervised
# stem fits: the mismatch that mmselfsup 1.0 shipped.
# Source: mmselfsup @80bb3f45 configs/benchmarks/mmsegmentation/_base_/models/fcn_r50-d8.py.
_base_ = '{{$MMSEG_CONFIGS:}}/_base_/models/fcn_r50-d8.py'
model = dict(pretrained=None, backbone=dict(type='ResNet'))
