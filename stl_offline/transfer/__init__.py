"""Dense transfer: a trained backbone fine-tuned on masks or boxes, or its token head as it is."""

from stl_offline.transfer.backbone import Backbone, load_backbone
from stl_offline.transfer.detect import dry_run_detector, train_detector
from stl_offline.transfer.detector import Detector, load_detector
from stl_offline.transfer.evaluate import SegmentExample, evaluate_transfer, segment_examples
from stl_offline.transfer.published import import_segmenter, read_segmenter
from stl_offline.transfer.pyramid_encoder import PyramidEncoder
from stl_offline.transfer.segment import dry_run_segmenter, train_segmenter
from stl_offline.transfer.segmenter import Segmenter, load_segmenter
from stl_offline.transfer.zero_train import score_token_head

__all__ = [
    "Backbone",
    "Detector",
    "PyramidEncoder",
    "SegmentExample",
    "Segmenter",
    "dry_run_detector",
    "dry_run_segmenter",
    "evaluate_transfer",
    "import_segmenter",
    "load_backbone",
    "load_detector",
    "load_segmenter",
    "read_segmenter",
    "score_token_head",
    "segment_examples",
    "train_detector",
    "train_segmenter",
]
