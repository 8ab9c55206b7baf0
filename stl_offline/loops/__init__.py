"""Token labels in a PyTorch loop of one's own: crops with their views, a dataset wrapper, mixing, timm's script.

Needs torch and Pillow, and neither FFCV nor packed images.
"""

from stl_offline.loops.crop import RandomResizedCrop
from stl_offline.loops.dataset import TokenBatch, TokenLabelDataset
from stl_offline.loops.mixing import MixedBatch, mix_batch
from stl_offline.loops.timm_script import TimmTokenDataset, TokenLoss

__all__ = [
    "MixedBatch",
    "RandomResizedCrop",
    "TimmTokenDataset",
    "TokenBatch",
    "TokenLabelDataset",
    "TokenLoss",
    "mix_batch",
]
