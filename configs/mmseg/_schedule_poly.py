# SGD 0.01, momentum 0.9, weight decay 5e-4, polynomial decay of power 0.9 to 1e-4.
# Source: MMSegmentation's schedule_20k.py / schedule_40k.py, used by DenseCL @b64bbb6 and mmselfsup @80bb3f45.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.0005),
    clip_grad=None)
