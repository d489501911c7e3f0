"""The TWIST method and its distributed training loop. Read `train.py` first, then `loss.py`."""
