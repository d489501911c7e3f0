# VOC 2012 train_aug (10,582 images of ImageSets/Segmentation/trainaug.txt, masks in SegmentationClassAug) → val (1,449).
# Pipelines are MMSegmentation's pascal_voc12.py: 512×512 crops of images at (2048, 512) × 0.5–2, whole-image test.
# The engine sets data_root (ROOT/VOC2012, or ROOT/VOCdevkit/VOC2012).
_base_ = '{{$MMSEG_CONFIGS:}}/_base_/datasets/pascal_voc12.py'
train_dataloader = dict(
    dataset=dict(
        ann_file='ImageSets/Segmentation/trainaug.txt',
        data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClassAug')))
