"""Beyond one machine: soft labels of many classes, images that stay on the disk, views by seed, several processes."""

from kdlib.scale.compact import CompactSoftLabels, bytes_per_view, compress
from kdlib.scale.compact_errors import compact_errors, made_up_logits
from kdlib.scale.compact_files import generate_compact, load_compact
from kdlib.scale.stream import StreamedImages, load_images
from kdlib.scale.views import SeededViews, mixup_pair

__all__ = [
    "CompactSoftLabels",
    "SeededViews",
    "StreamedImages",
    "bytes_per_view",
    "compact_errors",
    "compress",
    "generate_compact",
    "load_compact",
    "load_images",
    "made_up_logits",
    "mixup_pair",
]
