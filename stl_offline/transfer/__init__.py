"""Dense transfer: a trained backbone fine-tuned on masks."""

from stl_offline.transfer.segment import evaluate_segmenter, train_segmenter
from stl_offline.transfer.segmenter import Segmenter, load_segmenter

__all__ = ["Segmenter", "evaluate_segmenter", "load_segmenter", "train_segmenter"]
