# Settings that these weights imply (unknown, resnet18, from the layout backbone).
# Merge over any config (config.merge_from_dict(Config.fromfile(this file).to_dict())), and give
# init_cfg.checkpoint the full path of the weights.
model = dict(
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        rgb_to_bgr=False,
    ),
    pretrained=None,
    backbone=dict(
        type='ResNet',
        depth=18,
        stem_channels=64,
        base_channels=64,
        style='pytorch',
        deep_stem=False,
        avg_down=False,
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='weights.pth',
            prefix='backbone.',
        ),
    ),
)
