# SGD, momentum 0.9, weight decay 1e-4, lr × 0.1 at 70 % and 90 % of the iterations.
# Source: MoCo paper App. A.5; SlotCon @30ff33d transfer/segmentation/configs/_base_/schedules/schedule_*_moco.py.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.0001),
    clip_grad=None)
