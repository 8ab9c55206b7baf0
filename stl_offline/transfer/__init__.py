"""Dense transfer: a trained backbone fine-tuned on masks, or its token head as it is."""

from stl_offline.transfer.segment import evaluate_segmenter, train_segmenter
from stl_offline.transfer.segmenter import Segmenter, load_segmenter
from stl_offline.transfer.zero_train import score_token_head

__all__ = ["Segmenter", "evaluate_segmenter", "load_segmenter", "score_token_head", "train_segmenter"]
